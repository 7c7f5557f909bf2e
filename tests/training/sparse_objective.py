"""The sparse objective as plain functions, and the mixing matrix that its gradients follow."""

from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_matryoshka.kernels.codes import Codes, Layout
from sae_lens_matryoshka.kernels.dispatch import EAGER
from sae_lens_matryoshka.training.objective import DecodeNested, EncodeKept, LevelLosses

NONE_DEAD = torch.empty(0, dtype=torch.long)


def encode_kept(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_in: torch.Tensor,
    codes: Codes,
    layout: Layout,
    dead: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre-activations of the codes, encoder rows and biases of the dead latents."""
    return EncodeKept.apply(x, W_enc, b_enc, b_in, codes, layout, dead, EAGER)  # type: ignore


def decode_nested(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
    dead: torch.Tensor = NONE_DEAD,
    stop_gradient: Any = "none",
) -> tuple[LevelLosses, torch.Tensor]:
    """The losses of every level, and the decoder rows of the dead latents."""
    *levels, dead_rows = DecodeNested.apply(  # type: ignore[misc]
        acts, W_dec, b_dec, target, layout, n_levels, dead, stop_gradient, EAGER
    )
    return LevelLosses(*levels), dead_rows


def mixing_matrix(weights: Sequence[float], stop_gradient: str = "none") -> torch.Tensor:
    """M (P, P): the weight of each level's residual (column) in the gradient of a level (row)."""
    c = torch.tensor(weights, dtype=torch.float64)
    if stop_gradient == "none":
        return torch.ones(len(c), len(c), dtype=c.dtype).triu() * c
    own = torch.diag(c)
    if stop_gradient == "inner":
        own[:, -1] = c[-1]
    return own
