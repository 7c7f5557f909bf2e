"""Sums over codes in PyTorch: residuals of every level, gradients of codes and of weights.

A sum over codes is an embedding bag: a bag is a run of consecutive codes, its embedding a weighted
sum of matrix rows. Indices are int32, half the traffic of int64 and enough for any dictionary.
"""

from typing import Literal

import torch
from torch.nn.functional import embedding_bag

from sae_lens_matryoshka.kernels.codes import Layout

StopGradient = Literal["none", "all", "inner"]

_SUM = 0  # embedding_bag's number for mode="sum"


def level_residuals(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual of every level, and its loss.

    Args:
        acts: (n,) values of the codes.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        target: (B, d_in).
        layout: Layout of the codes.
        n_levels: P.

    Returns:
        (B, P, d_in) reconstruction minus target; (P,) its squared norm, averaged over the batch;
        (B, d_in) reconstruction of the outermost level.
    """
    increments = _sum_bags(W_dec, layout.latents, layout.bag_starts, acts.to(W_dec.dtype))
    dtype = torch.promote_types(W_dec.dtype, target.dtype)
    residuals = increments.to(dtype).view(len(target), n_levels, -1)
    residuals[:, 0] += b_dec - target
    for level in range(1, n_levels):
        residuals[:, level] += residuals[:, level - 1]
    # the norm reads the residuals once; their squares would be a second buffer of that size
    losses = torch.linalg.vector_norm(residuals, dim=-1).square().mean(0)
    return residuals, losses, residuals[:, -1] + target


def level_gradients(
    residuals: torch.Tensor,
    scales: torch.Tensor,
    grad_sae_out: torch.Tensor | None,
    stop_gradient: StopGradient,
    W_dec: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R_g of every row and level (see `training.objective`), and the gradients that follow from it.

    Args:
        residuals: (B, P, d_in), as `level_residuals` returns them.
        scales: (P,) factor of each level's residual: (2 / B) ∂L/∂L_p.
        grad_sae_out: (B, d_in) further gradient to the outermost reconstruction, or None.
        stop_gradient: See `training.options.NestedOptions`.
        W_dec: (d_sae, d_in).
        layout: Layout of the codes.

    Returns:
        (B * P, d_in) R_g, in the dtype of W_dec; (n,) gradients of the codes; (d_in,) of b_dec.
    """
    mixed = residuals * scales[:, None]
    if grad_sae_out is not None:
        mixed[:, -1] += grad_sae_out
    if stop_gradient == "none":
        for level in reversed(range(mixed.shape[1] - 1)):
            mixed[:, level] += mixed[:, level + 1]
        grad_b_dec = mixed[:, 0].sum(0)
    else:
        grad_b_dec = mixed.sum((0, 1))
        if stop_gradient == "inner":
            mixed[:, :-1] += mixed[:, -1:]
    flat = mixed.to(W_dec.dtype).flatten(0, 1)
    return flat, _dot_bags(flat, W_dec, layout), grad_b_dec.to(W_dec.dtype)


def sum_by_latent(
    matrix: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    layout: Layout,
    with_totals: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight's gradient: Σ_{codes i of latent j} weights_i · matrix[rows_i], and Σ weights_i.

    Args:
        matrix: (m, d).
        rows: (n,) int32, the matrix row of each code.
        weights: (n,) in the dtype of the matrix.
        layout: Layout of the codes.
        with_totals: Whether the second sum is needed; if not, it is None.

    Returns:
        (d_sae, d) and (d_sae,), zero where a latent has no code.
    """
    weights, starts = weights[layout.by_latent], layout.latent_starts
    totals = None
    if with_totals:
        ones, first = weights.new_ones(1, 1), torch.zeros_like(rows)
        totals = _sum_bags(ones, first, starts, weights).squeeze(-1)
    return _sum_bags(matrix, rows[layout.by_latent], starts, weights), totals


def _sum_bags(
    matrix: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Σ_{i in bag} weights_i · matrix[rows_i], (number of bags, d)."""
    return embedding_bag(
        rows, matrix, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _dot_bags(per_bag: torch.Tensor, matrix: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(n,) ⟨per_bag[bags_i], matrix[latents_i]⟩ of every code i."""
    # gathering both factors first would copy n rows twice; this reads each row once
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        per_bag, matrix, layout.latents, layout.bag_starts, layout.bags, _SUM
    )
