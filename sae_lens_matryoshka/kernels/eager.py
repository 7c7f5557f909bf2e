"""The sparse sums in PyTorch, for any device and floating dtype.

All are embedding bags: a bag is a run of consecutive codes, its embedding a weighted sum of matrix
rows. Indices are int32 throughout, half the traffic of int64 and enough for any dictionary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

_SUM = 0  # embedding_bag's number for mode="sum"


def starts_of(bags: torch.Tensor, n_bags: int) -> torch.Tensor:
    """Where each bag starts among ascending bag numbers (n,); int32 of shape (n_bags,)."""
    numbers = torch.arange(n_bags, device=bags.device, dtype=bags.dtype)
    return torch.searchsorted(bags, numbers, out_int32=True)


def sum_bags(
    matrix: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Σ_{i in bag} weights_i · matrix[rows_i] of every bag.

    Args:
        matrix: (m, d).
        rows: (n,) int32, row of the matrix that each code takes, ordered by bag.
        starts: (n_bags,) int32, as `starts_of` gives.
        weights: (n,) of the matrix' dtype.

    Returns:
        (n_bags, d), zero where a bag is empty.
    """
    return embedding_bag(rows, matrix, starts, mode="sum", per_sample_weights=weights)


def dot_bags(
    per_bag: torch.Tensor,
    matrix: torch.Tensor,
    rows: torch.Tensor,
    bags: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """⟨per_bag[bags_i], matrix[rows_i]⟩ of every code: the gradient of `sum_bags` to its weights.

    Args:
        per_bag: (n_bags, d).
        matrix: (m, d) of the same dtype.
        rows: (n,) int32, ordered by bag.
        bags: (n,) int32, ascending.
        starts: (n_bags,) int32.

    Returns:
        (n,) in the order of `rows`.
    """
    # gathering both sides first would copy n rows twice; this reads each row once
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        per_bag, matrix, rows, starts, bags, _SUM
    )
