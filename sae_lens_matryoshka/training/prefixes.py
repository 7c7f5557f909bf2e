"""The prefixes of a training step: which are drawn, and the level of each latent."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int

from sae_lens_matryoshka.kernels.transfers import to_device

PrefixSampling = Literal["fixed", "uniform", "log_uniform", "inverse_sqrt", "pareto"]

# the density over the prefix length l is l to the power of:
_EXPONENTS = {"uniform": 0.0, "log_uniform": -1.0, "inverse_sqrt": -0.5, "pareto": -1.5}


@lru_cache(maxsize=8)
def level_of_latent(
    prefixes: tuple[int, ...], device: torch.device | str
) -> Int[torch.Tensor, " d_sae"]:
    """The first level, from 0 on, that contains each latent, as int32; cached, so read-only.

    Args:
        prefixes: Prefix lengths of the levels, strictly increasing, the last of them d_sae.
        device: Device of the result.
    """
    ends = to_device(prefixes, torch.int64, device)
    latents = torch.arange(prefixes[-1], device=device)
    return torch.bucketize(latents, ends, right=True, out_int32=True)


def sample_prefixes(
    distribution: str, n: int, minimum: int, d_sae: int, seed: Sequence[int]
) -> list[int]:
    """`n` different prefix lengths from `minimum` on, ascending, the last of them `d_sae`.

    Args:
        distribution: One of `PrefixSampling` but "fixed"; see `options.NestedOptions`.
        n: From 1 to d_sae − minimum + 1.
        minimum: The shortest length.
        d_sae: Width of the dictionary.
        seed: The lengths depend on these numbers alone, on any device.
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
