"""Adam's moments split over processes (ZeRO, stage 1: Rajbhandari et al., arXiv 1910.02054).

PyTorch's `ZeroRedundancyOptimizer` gives whole tensors to processes, of which an SAE has two large
ones. Here every process keeps the moments of its part of each of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Adam

from sae_lens_matryoshka.runs.fused_adam import fuse, laid_out_as
from sae_lens_matryoshka.training.joined_batch import JoinedBatch, contiguous

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedMoments:
    """Updates `adam`'s parameters, each process its part; outside `whole`, `adam` has no moments.

    Every process of the group has to call the methods together.

    Args:
        adam: Its parameters, learning rate and betas are used; its moments are taken.
        joined_batch: The processes.
    """

    def __init__(self, adam: Adam, joined_batch: JoinedBatch) -> None:
        self._adam, self._joined_batch = adam, joined_batch
        self._parameters = [p for group in adam.param_groups for p in group["params"]]
        self._parts = [self._split(p.data) for p in self._parameters]
        self._own = [torch.nn.Parameter(parts[joined_batch.rank]) for parts in self._parts]
        self._optimizer = Adam(self._own, betas=adam.param_groups[0]["betas"])
        self.take()

    @torch.no_grad()
    def step(self, scale: torch.Tensor) -> None:
        """One update, from gradients that are divided by `scale` ()."""
        for parameter, own in zip(self._parameters, self._own, strict=True):
            own.grad = None
            if parameter.grad is not None:
                own.grad = self._split(parameter.grad)[self._joined_batch.rank] / scale
        self._optimizer.param_groups[0]["lr"] = self._adam.param_groups[0]["lr"]
        fuse(self._optimizer)
        self._optimizer.step()
        for parts in self._parts:
            self._share(parts)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which `adam` holds all moments, as in a run of one process."""
        for parameter, own in zip(self._parameters, self._own, strict=True):
            if state := self._optimizer.state.get(own):
                moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
                for name, moment in moments.items():
                    parts = self._split(moment)
                    parts[self._joined_batch.rank].copy_(state[name])
                    self._share(parts)
                self._adam.state[parameter] = {"step": state["step"].clone(), **moments}
        try:
            yield
        finally:
            self.take()

    def take(self) -> None:
        """Take this process's part of the moments that `adam` holds."""
        for parameter, own in zip(self._parameters, self._own, strict=True):
            if state := self._adam.state.pop(parameter, None):
                part: dict[str, Any] = {"step": state["step"].to(own.device)}
                for name in _MOMENTS:
                    moment = laid_out_as(parameter, state[name])
                    part[name] = self._split(moment)[self._joined_batch.rank].clone()
                self._optimizer.state[own] = part

    def _split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the parts of a tensor, by rank."""
        return contiguous(tensor).flatten().tensor_split(self._joined_batch.n_processes)

    def _share(self, parts: tuple[torch.Tensor, ...]) -> None:
        """Broadcast each part from the process that owns it."""
        for rank, part in enumerate(parts):
            if part.numel():
                dist.broadcast(part, src=rank, group=self._joined_batch.group)
