"""Which latent belongs to which level: the nested prefixes of the dictionary."""

from __future__ import annotations

import itertools
import numbers
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from sae_lens_matryoshka.kernels.transfers import to_device

PrefixSampling = Literal["fixed", "uniform", "log_uniform", "inverse_sqrt", "pareto"]

# The density over the prefix length l falls as l to the power of:
_EXPONENTS = {"uniform": 0.0, "log_uniform": -1.0, "inverse_sqrt": -0.5, "pareto": -1.5}

# Bussmann et al. (arXiv 2503.17547), section 4: 2048 / 6144 / 14336 / 30720 / 65536.
PAPER_FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)


def paper_widths(d_sae: int) -> list[int]:
    """The paper's split of a dictionary of `d_sae` latents into five nested levels.

    A dictionary too small for five distinct widths gets as many as it has room for.
    """
    return sorted({max(1, round(fraction * d_sae)) for fraction in PAPER_FRACTIONS})


def resolve_widths(widths: Sequence[int], d_sae: int) -> list[int]:
    """The level widths as training uses them: checked, complete, in a list of their own.

    An empty sequence means the paper's split. A last width other than `d_sae` gets `d_sae`
    appended with a warning, as in SAELens; the sequence passed in is never changed.

    Raises:
        ValueError: a width is not a positive integer of at most `d_sae`, or the widths do not
            strictly increase.
    """
    accepted = (
        f"strictly increasing integers from 1 to d_sae={d_sae}, such as {paper_widths(d_sae)}"
    )
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise ValueError(f"matryoshka_widths={widths!r} is not a list; accepted: {accepted}.")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, numbers.Integral):
            raise ValueError(
                f"matryoshka_widths={list(widths)} holds {width!r}, which is not an integer; "
                f"accepted: {accepted}."
            )
        if not 1 <= width <= d_sae:
            raise ValueError(
                f"matryoshka_widths={list(widths)} holds {width}, outside 1 to {d_sae}; "
                f"accepted: {accepted}."
            )
    resolved = [int(width) for width in widths] or paper_widths(d_sae)
    if any(inner >= outer for inner, outer in itertools.pairwise(resolved)):
        raise ValueError(
            f"matryoshka_widths={resolved} does not strictly increase; accepted: {accepted}."
        )
    if resolved[-1] != d_sae:
        warnings.warn(
            f"matryoshka_widths={resolved} does not end at d_sae={d_sae}: a last level of "
            f"{d_sae} latents is added.",
            stacklevel=5,  # the caller of the config's constructor
        )
        resolved.append(d_sae)
    return resolved


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
