"""Activations to sparse codes, some rows at a time."""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, JumpReLUSAE
from scipy import sparse

from sae_lens_matryoshka.kernels.screen import can_screen, pays_off, products_above

_CHUNK_ELEMENTS = 2**25  # of the dense codes that are computed at a time
_SCREENED_ROWS = 2**13


@torch.no_grad()
def encode(sae: SAE[Any], x: Float[torch.Tensor, "rows d_in"]) -> sparse.csr_array:
    """The codes of activations, sparse, (rows, d_sae), from dense ones."""
    acts = sae.encode(x.to(sae.device, sae.dtype))
    if acts.layout is torch.strided:
        acts = acts.to_sparse()
    acts = acts.coalesce().cpu()
    values = acts.values().float().numpy()
    return sparse.csr_array((values, acts.indices().numpy()), shape=tuple(acts.shape))


class Encoder:
    """What `sae.encode` computes, up to rounding, as sparse codes.

    A JumpReLU SAE in float32 on a processor with fast bfloat16 products computes only the
    pre-activations that may exceed their threshold (`kernels.screen`); others are encoded densely.

    Attributes:
        n_rows: How many activations to encode at a time, for bounded memory.

    Args:
        sae: An inference SAE.
    """

    def __init__(self, sae: SAE[Any]):
        self._sae = sae
        self._W_enc: torch.Tensor | None = None
        self.n_rows = max(1, _CHUNK_ELEMENTS // sae.cfg.d_sae)
        if (
            isinstance(sae, JumpReLUSAE)
            and sae.device.type == "cpu"
            and can_screen(sae.W_enc.T, sae.W_enc, "auto")
            and pays_off()
        ):
            self._W_enc = sae.W_enc.detach().T.contiguous().T  # so that its columns are read fast
            self.n_rows = _SCREENED_ROWS

    @torch.no_grad()
    def __call__(self, x: Float[torch.Tensor, "rows d_in"]) -> sparse.csr_array:
        """The codes of activations, (rows, d_sae)."""
        x = x.to(self._sae.device, self._sae.dtype)
        screened = self._screened(x)
        return encode(self._sae, x) if screened is None else screened

    def _screened(self, x: torch.Tensor) -> sparse.csr_array | None:
        """None where the screen is not used, or passes too much to be faster."""
        if self._W_enc is None:
            return None
        sae: Any = self._sae
        limits = sae.threshold.clamp(min=0) - sae.b_enc
        found = products_above(sae.process_sae_in(x), self._W_enc, limits, x.numel())
        if found is None:
            return None
        rows, latents, products = found
        pre_acts = products + sae.b_enc[latents]
        fires = ((pre_acts > sae.threshold[latents]) & (pre_acts > 0)).numpy()
        index = rows.numpy()[fires], latents.numpy()[fires]
        codes = sparse.coo_array((pre_acts.numpy()[fires], index), (len(x), sae.cfg.d_sae))
        return codes.tocsr()
