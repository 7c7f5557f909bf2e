"""The nested objective: every prefix of the dictionary reconstructs the activation alone.

Levels p = 1..P end at widths w_1 < … < w_P = d_sae. With codes a (B × d_sae), decoder rows d_j and
level(j) the first level that contains latent j (arXiv 2503.17547, eq. 3):

    x̂_p = b_dec + Σ_{j: level(j) ≤ p} a_j d_j        r_p = x̂_p − x        L_p = mean_b ‖r_p‖²
    L = Σ_p c_p L_p, with every c_p = 1 in the paper: `total_loss` in training/base.py

`reference_reconstructions` and `reference_losses` are these formulas on dense codes. `EncodeKept`
and `DecodeNested` compute the same from the codes that were kept, with gradients as sums over those
codes. The gradient that reaches a latent of level g is a mix of residuals, and each published
variant is one choice of the matrix M:

    R_g = (2/B) Σ_p M[g, p] r_p        ∂L/∂a_bj = ⟨R_level(j)[b], d_j⟩
                                       ∂L/∂d_j = Σ_b a_bj R_level(j)[b]

so the levels cost 2P buffers of B × d_in (residuals and their mixes) and no extra matrix product.
b_dec is part of every level, and stop-gradients are between latents: ∂L/∂b_dec = (2/B) Σ_b Σ_p c_p
r_p whatever M is. Both functions also return the rows of the dead latents, so that the gradient of
the auxiliary loss is added to the same buffers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from sae_lens_matryoshka.kernels.codes import Codes, Layout
from sae_lens_matryoshka.kernels.cut import top_of_rows
from sae_lens_matryoshka.kernels.dispatch import Backend
from sae_lens_matryoshka.kernels.out_of_memory import name_tensor_on_oom
from sae_lens_matryoshka.kernels.sums import StopGradient

# With more dead latents than this for each that takes part, sums over codes are faster.
_SPARSE_FROM = 4
# Dead pre-activations that are computed at once: on a CPU as many as its caches hold.
_CHUNK_ELEMENTS = {"cpu": 2**21}
_DEFAULT_CHUNK_ELEMENTS = 2**27


class LevelLosses(NamedTuple):
    """What the objective says of one batch.

    Attributes:
        losses: (P,) squared error of each level, summed over d_in and averaged over the batch.
        residuals: (P, B, d_in) reconstruction minus activation of each level, without gradient.
        sae_out: (B, d_in) reconstruction of the outermost level.
    """

    losses: torch.Tensor
    residuals: torch.Tensor
    sae_out: torch.Tensor


def reference_reconstructions(
    acts: Float[torch.Tensor, "batch d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_in"],
    b_dec: Float[torch.Tensor, " d_in"],
    widths: Sequence[int],
    stop_gradient: StopGradient = "none",
) -> Float[torch.Tensor, "levels batch d_in"]:
    """Every level's reconstruction, from dense codes."""
    reconstructions, inner = [], 0
    for width in widths:
        latents = acts[:, :width] @ W_dec[:width]
        if stop_gradient == "all" or (stop_gradient == "inner" and width < widths[-1]):
            detached = (acts[:, :inner] @ W_dec[:inner]).detach()
            latents = detached + acts[:, inner:width] @ W_dec[inner:width]
        reconstructions.append(latents + b_dec)
        inner = width
    return torch.stack(reconstructions)


def reference_losses(
    reconstructions: Float[torch.Tensor, "levels batch d_in"],
    target: Float[torch.Tensor, "batch d_in"],
) -> LevelLosses:
    """The objective as the paper writes it, from every level's reconstruction."""
    residuals = reconstructions - target
    return LevelLosses(
        losses=residuals.pow(2).sum(-1).mean(-1),
        residuals=residuals.detach(),
        sae_out=reconstructions[-1],
    )


class EncodeKept(torch.autograd.Function):
    """The pre-activations of the codes that were kept.

    `apply` returns the (n,) pre-activations, and the (D, d_in) encoder rows and (D,) biases of the
    dead latents. The gradient reaches W_enc, b_enc and b_in, not x; that of b_in covers the dead
    latents' pre-activations, `x @ rows.T + biases`, as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (B, d_in), b_in already subtracted
        W_enc: torch.Tensor,  # (d_in, d_sae), best with contiguous columns, as its gradient is
        b_enc: torch.Tensor,  # (d_sae,)
        b_in: torch.Tensor | None,  # (d_in,) subtracted from every activation
        codes: Codes,
        layout: Layout,
        dead: torch.Tensor,  # (D,) latents that the auxiliary loss needs
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, W_enc, codes.rows, dead, *layout)
        ctx.has_b_in, ctx.backend = b_in is not None, backend
        return codes.pre_acts.clone(), W_enc.T[dead], b_enc[dead]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_acts, grad_dead_rows, grad_dead_biases = grads
        x, W_enc, rows, dead, *layout = ctx.saved_tensors
        with name_tensor_on_oom("the gradient of W_enc", W_enc.shape, W_enc.dtype):
            grad_rows, grad_b_enc = ctx.backend.sum_by_latent(
                x, rows.int(), grad_acts.to(W_enc.dtype), Layout(*layout)
            )
        grad_rows.index_add_(0, dead, grad_dead_rows)
        grad_b_enc.index_add_(0, dead, grad_dead_biases)
        # a code's gradient to b_in is its encoder row: one product after summing over the codes
        grad_b_in = -(W_enc @ grad_b_enc) if ctx.has_b_in else None
        return None, grad_rows.T, grad_b_enc, grad_b_in, None, None, None, None


class DecodeNested(torch.autograd.Function):
    """The objective from the codes that were kept.

    `apply` returns the three fields of `LevelLosses`, and the (D, d_in) decoder rows of the dead
    latents. The gradient reaches acts, W_dec and b_dec.
    """

    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,  # (n,) factors of the decoder rows
        W_dec: torch.Tensor,  # (d_sae, d_in)
        b_dec: torch.Tensor,  # (d_in,)
        target: torch.Tensor,  # (B, d_in)
        layout: Layout,
        n_levels: int,
        dead: torch.Tensor,  # (D,) latents that the auxiliary loss needs
        stop_gradient: StopGradient,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch_size, d_in = target.shape
        with name_tensor_on_oom("the residuals", (batch_size, n_levels, d_in), W_dec.dtype):
            residuals, losses, sae_out = backend.level_residuals(
                acts, W_dec, b_dec, target, layout, n_levels
            )
        ctx.save_for_backward(acts, W_dec, residuals, dead, *layout)
        ctx.stop_gradient, ctx.backend = stop_gradient, backend
        ctx.set_materialize_grads(False)
        by_level = residuals.transpose(0, 1)
        ctx.mark_non_differentiable(by_level)
        return losses, by_level, sae_out, W_dec[dead]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_losses, _, grad_sae_out, grad_dead_rows = grads
        acts, W_dec, residuals, dead, *layout = ctx.saved_tensors
        layout = Layout(*layout)
        batch_size, n_levels, _ = residuals.shape

        if grad_losses is None:
            scales = residuals.new_zeros(n_levels)
        else:
            scales = grad_losses * (2 / batch_size)
        with name_tensor_on_oom("the gradients of the residuals", residuals.shape, W_dec.dtype):
            mixed, grad_acts, grad_b_dec = ctx.backend.level_gradients(
                residuals, scales, grad_sae_out, ctx.stop_gradient, W_dec, layout
            )
        with name_tensor_on_oom("the gradient of W_dec", W_dec.shape, W_dec.dtype):
            grad_W_dec, _ = ctx.backend.sum_by_latent(
                mixed, layout.bags, acts.to(W_dec.dtype), layout, with_totals=False
            )
        if grad_dead_rows is not None:
            grad_W_dec.index_add_(0, dead, grad_dead_rows)
        return (grad_acts.to(acts.dtype), grad_W_dec, grad_b_dec, *[None] * 6)


class SparseAuxiliaryError(torch.autograd.Function):
    """What dead latents leave of the residual, from the codes that take part.

    `apply` returns the mean squared error of `auxiliary_loss`: one level whose target is minus the
    residual. The gradient reaches the rows and biases.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,  # (B, d_in)
        x: torch.Tensor,  # (B, d_in) encoder input
        encoder_rows: torch.Tensor,  # (D, d_in)
        biases: torch.Tensor,  # (D,)
        norms: torch.Tensor | None,  # (D,)
        decoder_rows: torch.Tensor,  # (D, d_in)
        k_aux: int,
        backend: Backend,
    ) -> torch.Tensor:
        batch_size, n_dead = len(x), len(biases)
        parts = []
        elements = _CHUNK_ELEMENTS.get(x.device.type, _DEFAULT_CHUNK_ELEMENTS)
        for chunk in x.split(max(1, elements // n_dead)):
            with name_tensor_on_oom("dead pre-activations", (len(chunk), n_dead), x.dtype):
                pre_acts = chunk @ encoder_rows.T + biases
            top = top_of_rows(pre_acts if norms is None else pre_acts * norms, k_aux)
            parts.append((top, pre_acts.gather(1, top)))
        latents, acts = (torch.cat(tensors).flatten() for tensors in zip(*parts, strict=True))
        rows = torch.arange(batch_size, device=x.device).repeat_interleave(k_aux)
        codes = Codes(rows, latents, acts, acts, cut=0.0)
        level_of_latent = torch.zeros(n_dead, dtype=torch.int32, device=x.device)
        codes, layout = backend.lay_out(codes, batch_size, level_of_latent, 1, is_sorted=True)
        errors, losses, _ = backend.level_residuals(
            acts, decoder_rows, torch.zeros_like(residual[0]), -residual, layout, 1
        )
        ctx.save_for_backward(x, acts, errors, decoder_rows, *layout)
        ctx.backend = backend
        return losses[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, acts, errors, decoder_rows, *layout = ctx.saved_tensors
        layout, backend = Layout(*layout), ctx.backend
        scales = grads[0].reshape(1) * (2 / len(x))
        mixed, grad_acts, _ = backend.level_gradients(
            errors, scales, None, "none", decoder_rows, layout
        )
        dtype = decoder_rows.dtype
        grad_decoder_rows, _ = backend.sum_by_latent(
            mixed, layout.bags, acts.to(dtype), layout, with_totals=False
        )
        grad_encoder_rows, grad_biases = backend.sum_by_latent(
            x, layout.bags, grad_acts.to(dtype), layout
        )
        return None, None, grad_encoder_rows, grad_biases, None, grad_decoder_rows, None, None


def sparse_auxiliary_loss(
    residual: Float[torch.Tensor, "batch d_in"],
    x: Float[torch.Tensor, "batch d_in"],
    encoder_rows: Float[torch.Tensor, "dead d_in"],
    biases: Float[torch.Tensor, " dead"],
    norms: Float[torch.Tensor, " dead"] | None,
    decoder_rows: Float[torch.Tensor, "dead d_in"],
    backend: Backend,
) -> Float[torch.Tensor, ""]:
    """As `auxiliary_loss`, as sums over codes where many more latents are dead than take part."""
    k_aux = x.shape[1] // 2
    if len(biases) <= _SPARSE_FROM * k_aux:
        return auxiliary_loss(residual, x @ encoder_rows.T + biases, norms, decoder_rows)
    return SparseAuxiliaryError.apply(  # type: ignore[return-value]
        residual, x, encoder_rows, biases, norms, decoder_rows, k_aux, backend
    )


def auxiliary_loss(
    residual: Float[torch.Tensor, "batch d_in"],
    pre_acts: Float[torch.Tensor, "batch dead"],
    norms: Float[torch.Tensor, " dead"] | None,
    decoder_rows: Float[torch.Tensor, "dead d_in"],
) -> Float[torch.Tensor, ""]:
    """SAELens' auxiliary loss: dead latents reconstruct the residual of the living ones.

    In each row, the dead latents with the largest scores take part, at most d_in / 2 of them, with
    pre-activations of either sign (Gao et al., arXiv 2406.04093, appendix A.2, without the division
    by the residual's variance). With fewer dead latents the loss weighs proportionally less.

    Args:
        residual: Reconstruction minus activation, without gradient.
        pre_acts: Pre-activations of the dead latents.
        norms: Factor from pre-activation to score, or None where both are the same.
        decoder_rows: Decoder rows of the dead latents.
    """
    n_dead, d_in = decoder_rows.shape
    k_aux = d_in // 2
    if n_dead > k_aux:
        scores = pre_acts if norms is None else pre_acts * norms
        top = scores.topk(k_aux, sorted=False).indices
        pre_acts = torch.zeros_like(pre_acts).scatter(-1, top, pre_acts.gather(-1, top))
    errors = pre_acts @ decoder_rows + residual
    return min(n_dead / k_aux, 1.0) * errors.pow(2).sum(-1).mean()
