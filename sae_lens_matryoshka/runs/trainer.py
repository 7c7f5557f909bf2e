"""SAELens' trainer, on one process or on the joined batch of several."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from typing_extensions import override

from sae_lens_matryoshka.runs.fused_adam import fuse
from sae_lens_matryoshka.runs.sharded_moments import ShardedMoments
from sae_lens_matryoshka.training.base import DeferringStepInput, NestedTrainingSAE
from sae_lens_matryoshka.training.joined_batch import JoinedBatch, contiguous
from sae_lens_matryoshka.util.checks import invalid_option

_MAX_GRADIENT_NORM = 1.0  # SAELens'


class MatryoshkaTrainer(SAETrainer[TrainingSAE[Any], Any]):
    """SAELens' trainer with a fused update, for one process or several.

    With a process group, R processes with batches of B rows train as one process would with their
    joined batch of R · B rows: the same codes, losses, gradients, thresholds and dead latents. Each
    holds the whole SAE and its moments. `cfg.train_batch_size_samples` is the joined batch.

    Args:
        group: The processes; None for this one alone. Everything else is as for SAELens' trainer.
        shard_moments: Whether each process keeps only its part of Adam's moments.

    Attributes:
        is_writer: Whether this process is the one that writes checkpoints.

    Raises:
        ValueError: the SAE's architecture can't be trained on several processes.
    """

    def __init__(
        self,
        *args: Any,
        group: dist.ProcessGroup | None = None,
        shard_moments: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._joined_batch = JoinedBatch(group)
        self.is_writer = self._joined_batch.rank == 0  # of checkpoints
        self._sent: list[dist.Work] = []
        self._sharded: ShardedMoments | None = None
        if group is None:
            return
        if not isinstance(self.sae, NestedTrainingSAE):
            raise invalid_option(
                "sae.architecture",
                self.sae.cfg.architecture(),
                "one of this package's with several processes: matryoshka, matryoshka_topk, "
                "matryoshka_jumprelu",
            )
        self.sae.split_batches(group)
        self.activation_scaler = _JoinedActivationScaler(self._joined_batch)
        for tensor in self.sae.state_dict().values():
            dist.broadcast(contiguous(tensor), src=0, group=group)
        if shard_moments:
            self._sharded = ShardedMoments(self.optimizer, self._joined_batch)

    @property
    def has_sharded_moments(self) -> bool:
        """Whether this process holds only its part of Adam's moments."""
        return self._sharded is not None

    def whole_moments(self) -> AbstractContextManager[None]:
        """A context in which the optimizer holds all moments; every process has to enter it."""
        return nullcontext() if self._sharded is None else self._sharded.whole()

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        super().load_trainer_state(checkpoint_path)
        if self._sharded is not None:
            self._sharded.take()

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        n_before = self.n_training_samples
        output = super().step(batch)
        self.n_training_samples = n_before + self._joined_batch.size(len(batch))
        return output

    @override
    def _train_step(self, sae: TrainingSAE[Any], sae_in: torch.Tensor) -> TrainStepOutput:
        sae.train()
        with self.autocast_if_enabled:
            step_input = DeferringStepInput(
                sae_in=sae_in,
                dead_neuron_mask=self.dead_neurons,
                coefficients=self.get_coefficients(),
                n_training_steps=self.n_training_steps,
                is_logging_step=self._is_logging_step(),
            )
            output = sae.training_forward_pass(step_input=step_input)
        self._backward(output.loss)
        self._before_update(step_input)
        self._count_firings(output.feature_acts)
        self._update()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def _before_update(self, step_input: DeferringStepInput) -> None:
        try:
            for act in step_input.before_update:
                act()
        except Exception:
            self.optimizer.zero_grad()  # whoever goes on after this batch must not learn from it
            raise

    @torch.no_grad()
    def _count_firings(self, feature_acts: torch.Tensor) -> None:
        n_firings = feature_acts.bool().float().sum(0)
        if n_firings.is_sparse:
            n_firings = n_firings.to_dense()
        n_firings = self._joined_batch.sum(n_firings)
        self.n_forward_passes_since_fired.add_(1)
        self.n_forward_passes_since_fired.masked_fill_(n_firings > 0, 0)
        self.act_freq_scores.add_(n_firings)
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    def _backward(self, loss: torch.Tensor) -> None:
        """The gradients of the joined batch; each is on its way while others are computed."""
        if self._joined_batch.group is None:
            loss.backward()
            return
        # after the forward pass, so that the SAE's own hooks change a gradient before it is sent
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._send_gradient)
            for parameter in self.sae.parameters()
            if parameter.requires_grad
        ]
        try:
            (loss / self._joined_batch.n_processes).backward()
            while self._sent:
                self._sent.pop().wait()
        finally:
            self._sent.clear()
            for hook in hooks:
                hook.remove()

    def _send_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = contiguous(parameter.grad)
        work = dist.all_reduce(gradient, group=self._joined_batch.group, async_op=True)
        self._sent.append(cast(dist.Work, work))

    @torch.no_grad()
    def _update(self) -> None:
        parameters = [p for p in self.sae.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        scale = ((norm + 1e-6) / _MAX_GRADIENT_NORM).clamp(min=1)
        if self._sharded is not None:
            self._sharded.step(scale)
            return
        if fuse(self.optimizer) and all(p.dtype == torch.float32 for p in parameters):
            # clips within the update, which divides gradients by `grad_scale`, always a float32
            self.optimizer.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        else:
            clip_grads_with_norm_(parameters, _MAX_GRADIENT_NORM, norm)
        self.optimizer.step()

    @override
    @torch.no_grad()
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        logged = super().build_train_step_log_dict(output, n_training_samples)
        if self._joined_batch.group is None:
            return logged
        values = torch.tensor([float(value) for value in logged.values()], dtype=torch.float64)
        means = self._joined_batch.by_rank(values.to(self.sae.device)).mean(0)
        return dict(zip(logged, means.tolist(), strict=True))


class _JoinedActivationScaler(ActivationScaler):
    """Estimates the statistics of the activations from the batches of all processes."""

    def __init__(self, joined_batch: JoinedBatch) -> None:
        super().__init__()
        self._joined_batch = joined_batch

    @override
    def _calculate_mean_norm(
        self, data_provider: Iterator[torch.Tensor], n_batches_for_norm_estimate: int = 1000
    ) -> float:
        norms = (batch.norm(dim=-1, keepdim=True) for batch in data_provider)
        return super()._calculate_mean_norm(self._joined(norms), n_batches_for_norm_estimate)

    @override
    def estimate_whitening(
        self, d_in: int, data_provider: Iterator[torch.Tensor], *args: Any, **kwargs: Any
    ) -> None:
        super().estimate_whitening(d_in, self._joined(data_provider), *args, **kwargs)

    def _joined(self, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (self._joined_batch.by_rank(batch).flatten(0, 1) for batch in batches)
