"""The codes of a batch: what the selection hands on, and how the sparse sums read it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Codes(NamedTuple):
    """The n non-zero codes of a batch of B activations, by row.

    Within a row they ascend by latent when selected, and by level once laid out.

    A GPU doesn't tell the host how many codes it kept, so its buffers have room for all of them.
    The rest is padding: the last latent on the last row, with score and pre-activation 0.

    Attributes:
        rows: (n,) int64, index of the activation in the batch.
        latents: (n,) int64.
        scores: (n,) pre-activation times decoder norm: SAELens' `feature_acts`.
        pre_acts: (n,) pre-activation: the factor of the decoder row.
        cut: The smallest score that was kept if `k * B` were kept, else 0; a tensor where the
            device is still computing it.
        n_valid: () int64, the number of codes in front of the padding; None without padding.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    scores: torch.Tensor
    pre_acts: torch.Tensor
    cut: float | torch.Tensor
    n_valid: torch.Tensor | None = None

    def permuted(self, permutation: torch.Tensor) -> Codes:
        """The same codes; the i-th is the one that was at permutation[i]."""
        rows, latents, scores, pre_acts = (tensor[permutation] for tensor in self[:4])
        return self._replace(rows=rows, latents=latents, scores=scores, pre_acts=pre_acts)


class Layout(NamedTuple):
    """n codes as bags: runs of consecutive codes of one (row, level), or of one latent.

    Padding is in no bag.

    Attributes:
        latents: (n,) int32, latent of each code.
        bags: (n,) int32, row * P + level of each code, ascending.
        bag_starts: (B * P + 1,) int32, the first code of each bag; the last entry ends the last.
        by_latent: (n,) int32, the codes sorted by latent, those of one latent in their order.
        latent_starts: (d_sae + 1,) int32, where each latent's codes start in `by_latent`.
    """

    latents: torch.Tensor
    bags: torch.Tensor
    bag_starts: torch.Tensor
    by_latent: torch.Tensor
    latent_starts: torch.Tensor
