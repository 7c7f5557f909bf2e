"""The prefixes of a training step: which are drawn, and the level of each latent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from sae_lens_matryoshka.kernels.transfers import to_device

PrefixSampling = Literal["fixed", "uniform", "log_uniform", "inverse_sqrt", "pareto"]

# The density over the prefix length l falls as l to the power of:
_EXPONENTS = {"uniform": 0.0, "log_uniform": -1.0, "inverse_sqrt": -0.5, "pareto": -1.5}


def level_of(latents: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """The first level, counted from 0, that contains each latent.

    Args:
        latents: Latent indices of any shape, each below `widths[-1]`.
        widths: The P level widths, strictly increasing.

    Returns:
        int32 tensor of the shape of `latents`, with values 0 to P − 1.
    """
    ends = to_device(widths, latents.dtype, latents.device)
    return torch.bucketize(latents, ends, right=True, out_int32=True)


@lru_cache(maxsize=8)
def level_table(prefixes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(d_sae,) int32 level of each latent; `prefixes` end at d_sae. One tensor, for all to read."""
    return level_of(torch.arange(prefixes[-1], device=device), prefixes)


def sample_prefixes(
    distribution: str, n: int, minimum: int, d_sae: int, seed: Sequence[int]
) -> list[int]:
    """`n` different prefix lengths from `minimum` on, ascending, the last of them `d_sae`.

    Args:
        distribution: One of `PrefixSampling` but "fixed"; see `options.NestedOptions`.
        n: From 1 to d_sae − minimum + 1.
        minimum: The shortest length.
        d_sae: Width of the dictionary.
        seed: What is drawn depends on these numbers alone, on any device.
    """
    if n == 1:
        return [d_sae]
    lengths = np.random.default_rng(seed).choice(
        np.arange(minimum, d_sae),
        size=n - 1,
        replace=False,
        p=_density(distribution, minimum, d_sae),
    )
    return [*sorted(lengths.tolist()), d_sae]


@lru_cache(maxsize=8)
def _density(distribution: str, minimum: int, d_sae: int) -> np.ndarray:
    density = np.arange(minimum, d_sae, dtype=np.float64) ** _EXPONENTS[distribution]
    return density / density.sum()
