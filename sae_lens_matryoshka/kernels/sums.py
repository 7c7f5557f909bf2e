"""The sparse arithmetic of a step in PyTorch, for any device and floating dtype.

These are the twins that the Triton kernels are tested against. The sums are embedding bags: a bag
is a run of consecutive codes, its embedding a weighted sum of matrix rows. Indices are int32
throughout, half the traffic of int64 and enough for any dictionary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

from sae_lens_matryoshka.kernels.layout import Layout
from sae_lens_matryoshka.kernels.selection import Codes
from sae_lens_matryoshka.training.options import StopGradient

_SUM = 0  # embedding_bag's number for mode="sum"


def order(
    codes: Codes, batch_size: int, levels: torch.Tensor, n_levels: int, are_levels_ascending: bool
) -> tuple[Codes, Layout]:
    """The codes by row and within a row by level, and their layout.

    Args:
        codes: By row and within a row by latent.
        batch_size: B.
        levels: (d_sae,) int32, the level of each latent, from 0 on.
        n_levels: P.
        are_levels_ascending: Whether `levels` rises with the latents, so that the codes are in
            order already.
    """
    bags = codes.rows.int() * n_levels + levels[codes.latents]
    if not are_levels_ascending:
        bags, places = bags.sort(stable=True)
        codes = codes.in_order(places)
    latents = codes.latents.int()
    ascending, by_latent = latents.sort(stable=True)
    return codes, Layout(
        latents=latents,
        bags=bags,
        bag_starts=_starts(bags, batch_size * n_levels),
        by_latent=by_latent.int(),
        latent_starts=_starts(ascending, len(levels)),
    )


def _starts(bags: torch.Tensor, n_bags: int) -> torch.Tensor:
    numbers = torch.arange(n_bags + 1, device=bags.device, dtype=bags.dtype)
    return torch.searchsorted(bags, numbers, out_int32=True)


def residuals(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What every level leaves over of the activations, and what it costs.

    Args:
        acts: (n,) values of the codes.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        target: (B, d_in).
        layout: Of the codes.
        n_levels: P.

    Returns:
        (B, P, d_in) reconstruction minus activation, (P,) its squared norm averaged over the batch,
        and the outermost level's reconstruction (B, d_in).
    """
    left = _sum_bags(W_dec, layout.latents, layout.bag_starts, acts.to(W_dec.dtype))
    left = left.to(torch.promote_types(W_dec.dtype, target.dtype)).view(len(target), n_levels, -1)
    left[:, 0] += b_dec - target
    for level in range(1, n_levels):
        left[:, level] += left[:, level - 1]
    # the norm reads the residuals once; their squares would be a second buffer of that size
    losses = torch.linalg.vector_norm(left, dim=-1).square().mean(0)
    return left, losses, left[:, -1] + target


def gradients(
    residuals: torch.Tensor,
    scales: torch.Tensor,
    grad_sae_out: torch.Tensor | None,
    stop_gradient: StopGradient,
    W_dec: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R_g of every row and level, and what follows from it.

    Args:
        residuals: (B, P, d_in), as `residuals` gives them.
        scales: (P,) what each level's residual is multiplied with: (2 / B) ∂L/∂L_p.
        grad_sae_out: (B, d_in) gradient to the outermost reconstruction besides, or None.
        stop_gradient: See `options.NestedOptions`.
        W_dec: (d_sae, d_in).
        layout: Of the codes.

    Returns:
        (B · P, d_in) R_g, in the dtype of W_dec; (n,) gradients of the codes; (d_in,) of b_dec.
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
    matrix: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_{codes i of latent j} weights_i · matrix[rows_i], a weight's gradient, and Σ weights_i.

    Args:
        matrix: (m, d).
        rows: (n,) int32, the row of the matrix that each code takes.
        weights: (n,) of the matrix' dtype.
        layout: Of the codes.

    Returns:
        (d_sae, d) and (d_sae,), zero where a latent has no code.
    """
    weights, starts = weights[layout.by_latent], layout.latent_starts
    total = _sum_bags(weights.new_ones(1, 1), torch.zeros_like(rows), starts, weights)
    return _sum_bags(matrix, rows[layout.by_latent], starts, weights), total.squeeze(-1)


def _sum_bags(
    matrix: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Σ_{i in bag} weights_i · matrix[rows_i], (number of bags, d)."""
    return embedding_bag(
        rows, matrix, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _dot_bags(per_bag: torch.Tensor, matrix: torch.Tensor, layout: Layout) -> torch.Tensor:
    """⟨per_bag[bags_i], matrix[latents_i]⟩ of every code, (n,)."""
    # gathering both sides first would copy n rows twice; this reads each row once
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        per_bag, matrix, layout.latents, layout.bag_starts, layout.bags, _SUM
    )
