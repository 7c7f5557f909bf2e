"""Random numbers that do not depend on who else draws some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch

_N_SEEDS = 10**9  # so that no two purposes share a seed of torch


class Purpose(IntEnum):
    """What is drawn; one seed of a run gives each a stream of its own."""

    SAMPLES = 1  # 0 is what models make of the seed itself
    SAE = 2
    SCORING = 3


class RandomStream:
    """A sequence of random numbers of its own, drawn by code that uses torch's default generators.

    Args:
        seed: The run's, from 0 to 999,999,999.
        purpose: What the numbers are for.
        device: Where they are drawn, beside the CPU.
    """

    def __init__(self, seed: int, purpose: Purpose, device: str = "cpu"):
        self._seed = purpose * _N_SEEDS + seed
        is_cuda = torch.device(device).type == "cuda"
        self._devices = [torch.device(device).index or 0] if is_cuda else []
        self._states: list[torch.Tensor] | None = None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """While the block runs, what is drawn comes from this stream, and from where it stopped."""
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
        raise ValueError(f"seed={seed} is not accepted: give 0 to {_N_SEEDS - 1}.")
