"""Random streams that are independent of each other and of everything else that draws numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch

from sae_lens_matryoshka.util.checks import invalid_option

_N_SEEDS = 10**9  # so that no two purposes share a seed of torch


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has its own stream of a run's seed."""

    SAMPLES = 1  # 0 is left to models, which use the seed itself
    SAE = 2
    SCORING = 3


class RandomStream:
    """A random stream of its own for code that draws from torch's default generators.

    Args:
        seed: The run's, from 0 to 999,999,999.
        purpose: What the numbers are for.
        device: Where numbers are drawn, besides the CPU.
    """

    def __init__(self, seed: int, purpose: Purpose, device: str = "cpu"):
        self._seed = purpose * _N_SEEDS + seed
        is_cuda = torch.device(device).type == "cuda"
        self._devices = [torch.device(device).index or 0] if is_cuda else []
        self._states: list[torch.Tensor] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block runs, the default generators continue this stream."""
        with torch.random.fork_rng(self._devices):
            if self._states is None:
                torch.manual_seed(self._seed)
            else:
                torch.set_rng_state(self._states[0])
                for device, state in zip(self._devices, self._states[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                on_devices = (torch.cuda.get_rng_state(device) for device in self._devices)
                self._states = [torch.get_rng_state(), *on_devices]


def check_seed(seed: int) -> None:
    """Check that a run can have this seed.

    Raises:
        ValueError: it can't.
    """
    if not 0 <= seed < _N_SEEDS:
        raise invalid_option("seed", seed, f"0 to {_N_SEEDS - 1}")
