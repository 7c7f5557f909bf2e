"""Decoder rows of norm 1, and gradients without a component along them."""

import weakref

import torch
from jaxtyping import Float

from sae_lens_matryoshka.training.options import DecoderNorm


def set_norms_to_1(W_dec: Float[torch.Tensor, "d_sae d_in"]) -> None:
    """Divide each decoder row by its norm, in place; rows of norm 0 stay 0."""
    W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(W_dec.dtype).tiny)


class DecoderNormConstraint:
    """Keeps a decoder to what `NestedOptions.decoder_norm` says.

    Args:
        kind: The option.
    """

    def __init__(self, kind: DecoderNorm) -> None:
        self._kind = kind
        self._hooked: weakref.ref[torch.Tensor] | None = None

    def before_forward(self, W_dec: torch.nn.Parameter) -> None:
        """Prepare W_dec (d_sae, d_in) for a forward pass, and its gradient for the next update."""
        if self._kind == "free":
            return
        if self._kind == "unit":
            with torch.no_grad():
                set_norms_to_1(W_dec)
        hooked = self._hooked and self._hooked()
        if hooked is not W_dec and W_dec.requires_grad:  # loading an SAE replaces the parameter
            W_dec.register_post_accumulate_grad_hook(self._project_gradient)
            self._hooked = weakref.ref(W_dec)

    @torch.no_grad()
    def _project_gradient(self, W_dec: torch.Tensor) -> None:
        if self._kind == "unit_at_update":
            set_norms_to_1(W_dec)
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
