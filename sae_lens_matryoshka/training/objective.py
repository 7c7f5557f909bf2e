"""The nested objective: every prefix of the dictionary reconstructs the activation alone.

Levels p = 1..P end at widths w_1 < … < w_P = d_sae. With codes a (B × d_sae), decoder rows d_j and
level(j) the first level that contains latent j (arXiv 2503.17547, eq. 3):

    x̂_p = b_dec + Σ_{j: level(j) ≤ p} a_j d_j        r_p = x̂_p − x        L_p = mean_b ‖r_p‖²

`reference_levels` is that formula on dense codes. `encode_selected` and `decode_nested` compute the
same from the codes that were kept, with gradients as sums over those codes. What reaches a latent
of level g is a mix of residuals, and each published variant is one choice of the matrix M:

    R_g = (2/B) Σ_p M[g, p] r_p        ∂L/∂a_bj = ⟨R_level(j)[b], d_j⟩
                                       ∂L/∂d_j = Σ_b a_bj R_level(j)[b]

so the levels cost P buffers of B × d_in and no extra matrix product. b_dec is part of every level,
and stop-gradients are between latents: ∂L/∂b_dec = (2/B) Σ_b Σ_p c_p r_p whatever M is. Both
functions also hand out the rows of the dead latents, because the auxiliary loss' gradient then
lands in the same buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sae_lens_matryoshka.kernels.dispatch import EAGER, Kernels
from sae_lens_matryoshka.kernels.layout import Layout
from sae_lens_matryoshka.kernels.out_of_memory import name_tensor_on_oom
from sae_lens_matryoshka.kernels.selection import Codes
from sae_lens_matryoshka.training.options import StopGradient


class Levels(NamedTuple):
    """What the objective says of one batch.

    Attributes:
        losses: (P,) squared error of each level, summed over d_in and averaged over the batch.
        residuals: (P, B, d_in) reconstruction minus activation of each level, without gradient.
        sae_out: (B, d_in) reconstruction of the outermost level.
    """

    losses: torch.Tensor
    residuals: torch.Tensor
    sae_out: torch.Tensor


def reference_levels(
    reconstructions: torch.Tensor,
    target: torch.Tensor,
) -> Levels:
    """The objective as the paper writes it, from every level's reconstruction (P, B, d_in)."""
    residuals = reconstructions - target
    return Levels(
        losses=residuals.pow(2).sum(-1).mean(-1),
        residuals=residuals.detach(),
        sae_out=reconstructions[-1],
    )


def reference_reconstructions(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    widths: Sequence[int],
    stop_gradient: StopGradient = "none",
) -> torch.Tensor:
    """Every level's reconstruction (P, B, d_in) from dense codes (B, d_sae)."""
    reconstructions, inner = [], 0
    for width in widths:
        latents = acts[:, :width] @ W_dec[:width]
        if stop_gradient == "all" or (stop_gradient == "inner" and width < widths[-1]):
            detached = (acts[:, :inner] @ W_dec[:inner]).detach()
            latents = detached + acts[:, inner:width] @ W_dec[inner:width]
        reconstructions.append(latents + b_dec)
        inner = width
    return torch.stack(reconstructions)


def mixing_matrix(weights: Sequence[float], stop_gradient: StopGradient = "none") -> torch.Tensor:
    """M (P, P): what the loss of each level (column) weighs in the gradient of latents of a level.

    Args:
        weights: c_p of the P levels, innermost first.
        stop_gradient: See `options.NestedOptions`.
    """
    c = torch.tensor(weights, dtype=torch.float64)
    if stop_gradient == "none":
        return torch.ones(len(c), len(c), dtype=c.dtype).triu() * c
    own = torch.diag(c)
    if stop_gradient == "inner":
        own[:, -1] = c[-1]
    return own


def encode_selected(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_in: torch.Tensor | None,
    codes: Codes,
    layout: Layout,
    dead: torch.Tensor,
    kernels: Kernels = EAGER,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept pre-activations, with gradients to W_enc, b_enc and b_in, and none to x.

    Args:
        x: (B, d_in) encoder input, `b_in` already subtracted.
        W_enc: (d_in, d_sae), whose transpose is best contiguous: gradients are written that way.
        b_enc: (d_sae,).
        b_in: (d_in,) what was subtracted from every activation, or None.
        codes: What `selection.select` kept of this batch.
        layout: Of these codes.
        dead: (D,) latents whose encoder the auxiliary loss needs.
        kernels: Who computes it.

    Returns:
        (n,) pre-activations of the codes, and the dead latents' (D, d_in) encoder rows and (D,)
        biases. The gradient to b_in covers what becomes of these two as `x @ rows.T + biases`.
    """
    return _EncodeSelected.apply(x, W_enc, b_enc, b_in, codes, layout, dead, kernels)  # type: ignore[return-value]


def decode_nested(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
    dead: torch.Tensor,
    stop_gradient: StopGradient = "none",
    kernels: Kernels = EAGER,
) -> tuple[Levels, torch.Tensor]:
    """The objective from the kept codes, with gradients to acts, W_dec and b_dec.

    Args:
        acts: (n,) values of the codes, in the order of `Codes`.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        target: (B, d_in) activations to reconstruct.
        layout: Of the codes that `acts` belong to.
        n_levels: P.
        dead: (D,) latents whose decoder rows the auxiliary loss needs.
        stop_gradient: See `options.NestedOptions`.
        kernels: Who computes it.

    Returns:
        The levels, and the (D, d_in) decoder rows of the dead latents.
    """
    losses, sae_out, residuals, dead_rows = _DecodeNested.apply(  # type: ignore[misc]
        acts, W_dec, b_dec, target, layout, n_levels, dead, stop_gradient, kernels
    )
    return Levels(losses=losses, residuals=residuals, sae_out=sae_out), dead_rows


class _EncodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        b_in: torch.Tensor | None,
        codes: Codes,
        layout: Layout,
        dead: torch.Tensor,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, W_enc, codes.rows, dead, *layout)
        ctx.has_b_in = b_in is not None
        ctx.kernels = kernels
        return codes.pre_acts.clone(), W_enc.T[dead], b_enc[dead]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_acts, grad_dead_rows, grad_dead_biases = grads
        x, W_enc, rows, dead, *layout = ctx.saved_tensors
        with name_tensor_on_oom("the gradient of W_enc", W_enc.shape, W_enc.dtype):
            grad_rows, grad_b_enc = ctx.kernels.sum_by_latent(
                x, rows.int(), grad_acts.to(W_enc.dtype), Layout(*layout)
            )
        grad_rows.index_add_(0, dead, grad_dead_rows)
        grad_b_enc.index_add_(0, dead, grad_dead_biases)
        # each code's gradient to b_in is its encoder row's: sum the codes first, the rows once
        grad_b_in = -(W_enc @ grad_b_enc) if ctx.has_b_in else None
        return None, grad_rows.T, grad_b_enc, grad_b_in, None, None, None, None


class _DecodeNested(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        target: torch.Tensor,
        layout: Layout,
        n_levels: int,
        dead: torch.Tensor,
        stop_gradient: StopGradient,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch_size, d_in = target.shape
        with name_tensor_on_oom("the residuals", (batch_size, n_levels, d_in), W_dec.dtype):
            residuals, losses, sae_out = kernels.residuals(
                acts, W_dec, b_dec, target, layout, n_levels
            )
        ctx.save_for_backward(acts, W_dec, residuals, dead, *layout)
        ctx.stop_gradient = stop_gradient
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        by_level = residuals.transpose(0, 1)
        ctx.mark_non_differentiable(by_level)
        return losses, sae_out, by_level, W_dec[dead]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_losses, grad_sae_out, _, grad_dead_rows = grads
        acts, W_dec, residuals, dead, *layout = ctx.saved_tensors
        layout = Layout(*layout)
        batch_size, n_levels, _ = residuals.shape

        if grad_losses is None:
            scales = residuals.new_zeros(n_levels)
        else:
            scales = grad_losses * (2 / batch_size)
        with name_tensor_on_oom("the residuals' gradients", residuals.shape, W_dec.dtype):
            mixed, grad_acts, grad_b_dec = ctx.kernels.gradients(
                residuals, scales, grad_sae_out, ctx.stop_gradient, W_dec, layout
            )
        with name_tensor_on_oom("the gradient of W_dec", W_dec.shape, W_dec.dtype):
            grad_W_dec, _ = ctx.kernels.sum_by_latent(
                mixed, layout.bags, acts.to(W_dec.dtype), layout
            )
        if grad_dead_rows is not None:
            grad_W_dec.index_add_(0, dead, grad_dead_rows)
        return (grad_acts.to(acts.dtype), grad_W_dec, grad_b_dec, *[None] * 6)


def auxiliary_loss(
    residual: torch.Tensor,
    pre_acts: torch.Tensor,
    norms: torch.Tensor | None,
    decoder_rows: torch.Tensor,
) -> torch.Tensor:
    """SAELens' auxiliary loss: dead latents reconstruct what the living ones leave over.

    The D dead latents with the largest scores of a row, d_in / 2 of them at most, take part, with
    their pre-activations of either sign (Gao et al., arXiv 2406.04093, appendix A.2, without the
    division by the residual's variance). Few dead latents weigh less.

    Args:
        residual: (B, d_in) reconstruction minus activation, without gradient.
        pre_acts: (B, D) pre-activations of the dead latents.
        norms: (D,) factor that turns pre-activations into scores, or None where they are scores.
        decoder_rows: (D, d_in).
    """
    n_dead, d_in = decoder_rows.shape
    k_aux = d_in // 2
    if n_dead > k_aux:
        scores = pre_acts if norms is None else pre_acts * norms
        top = scores.topk(k_aux, sorted=False).indices
        pre_acts = torch.zeros_like(pre_acts).scatter(-1, top, pre_acts.gather(-1, top))
    errors = pre_acts @ decoder_rows + residual
    return min(n_dead / k_aux, 1.0) * errors.pow(2).sum(-1).mean()
