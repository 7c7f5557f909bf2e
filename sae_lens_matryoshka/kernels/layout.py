"""Codes sorted by (row, level) and by latent, in PyTorch."""

import torch

from sae_lens_matryoshka.kernels.codes import Codes, Layout


def lay_out(
    codes: Codes,
    batch_size: int,
    level_of_latent: torch.Tensor,
    n_levels: int,
    is_sorted: bool,
) -> tuple[Codes, Layout]:
    """The codes by row and within a row by level, and their layout.

    Args:
        codes: By row and within a row by latent; with one level, in any order within a row.
        batch_size: B.
        level_of_latent: (d_sae,) int32, from 0 on.
        n_levels: P.
        is_sorted: Whether `level_of_latent` ascends, so that the codes are in order already.
    """
    bags = codes.rows.int() * n_levels + level_of_latent[codes.latents]
    if not is_sorted:
        bags, permutation = bags.sort(stable=True)
        codes = codes.permuted(permutation)
    latents = codes.latents.int()
    ascending, by_latent = latents.sort(stable=True)
    return codes, Layout(
        latents=latents,
        bags=bags,
        bag_starts=_starts(bags, batch_size * n_levels),
        by_latent=by_latent.int(),
        latent_starts=_starts(ascending, len(level_of_latent)),
    )


def _starts(ascending: torch.Tensor, n_values: int) -> torch.Tensor:
    """(n_values + 1,) where each of the values 0, 1, … starts, and the number of elements."""
    values = torch.arange(n_values + 1, device=ascending.device, dtype=ascending.dtype)
    return torch.searchsorted(ascending, values, out_int32=True)
