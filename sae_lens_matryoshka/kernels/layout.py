"""The codes of a batch as the sparse sums run over them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """n codes as bags: runs of consecutive codes of one (row, level), or of one latent.

    Codes that only fill up (see `selection.Codes`) are in no bag.

    Attributes:
        latents: (n,) int32, latents of the codes.
        bags: (n,) int32, each code's place among the B · P bags (row, level), ascending.
        bag_starts: (B · P + 1,) int32, where each bag starts, and their number.
        by_latent: (n,) int32, the codes in ascending order of their latents, those of one latent
            in the order of the codes.
        latent_starts: (d_sae + 1,) int32, where each latent starts in that order, and their
            number.
    """

    latents: torch.Tensor
    bags: torch.Tensor
    bag_starts: torch.Tensor
    by_latent: torch.Tensor
    latent_starts: torch.Tensor
