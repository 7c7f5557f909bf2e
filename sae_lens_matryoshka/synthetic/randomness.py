"""Random streams that are independent of each other and of everything else that draws numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch

MAX_SEED = 10**9 - 1  # of a run, so that no two purposes share a seed of torch


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has its own stream of a run's seed."""

    SAMPLES = 1  # 0 is left to models, which use the seed itself
    SAE = 2
    SCORING = 3
    TREE = 4


class RandomStream:
    """A random stream of its own for code that draws from torch's default generators.

    Args:
        seed: The run's, from 0 to `MAX_SEED`.
        purpose: What the numbers are for.
        device: Where numbers are drawn, besides the CPU.
    """

    def __init__(self, seed: int, purpose: Purpose, device: str = "cpu"):
        self._generators = [torch.default_generator]
        if torch.device(device).type == "cuda":
            torch.cuda.init()  # makes its default generators
            self._generators.append(torch.cuda.default_generators[torch.device(device).index or 0])
        torch_seed = purpose * (MAX_SEED + 1) + seed
        self._states = [
            torch.Generator(default.device).manual_seed(torch_seed).get_state()
            for default in self._generators
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block runs, the default generators continue this stream."""
        outside = self._swap(self._states)
        try:
            yield
        finally:
            self._states = self._swap(outside)

    def _swap(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Set the states of the default generators, and return their previous ones."""
        previous = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        return previous
