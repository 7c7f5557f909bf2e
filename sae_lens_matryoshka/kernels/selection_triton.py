"""Exact BatchTopK selection in Triton, without sorting B × d_sae scores.

Candidates are the scores above a floor, a little below the last step's cut. If the floor was wrong
(fewer candidates than codes to keep, or more than fit the buffer), kernels that otherwise return at
once find a floor in the same way from the whole matrix, and pick the candidates again. The host
launches the same kernels either way and never waits. Where float32 products are slow, a screen
finds the codes without computing them all; the host then waits to learn whether it did.
"""

import torch

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.cut import FLOOR_FRACTION, SCREEN_FRACTIONS
from sae_lens_matryoshka.kernels.cut_triton import candidates_above, keep_largest, matrix_of
from sae_lens_matryoshka.kernels.screen import can_screen
from sae_lens_matryoshka.kernels.screen_triton import pays_off, select_screened
from sae_lens_matryoshka.kernels.selection import Selection


def select(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    last_cut: float | torch.Tensor | None,
    selection: Selection = "auto",
) -> Codes:
    """As `selection.select`, with two differences.

    Of scores that tie at the cut, those of the lowest rows are kept, and within a row those of the
    lowest latents. There are always `n_keep` codes, the last of them padding if fewer scores are
    positive.
    """
    if isinstance(last_cut, torch.Tensor):  # one from another device is copied without waiting
        last_cut = last_cut.to(x.device, torch.float32, non_blocking=True)
    is_screened = can_screen(x, W_enc, selection) and (selection == "screen" or pays_off(x, W_enc))
    if is_screened and last_cut is not None and n_keep > 0:
        for fraction in SCREEN_FRACTIONS:
            codes = select_screened(x, W_enc, b_enc, norms, n_keep, fraction * last_cut)
            if codes is not None:
                return codes
    return _select_from_product(x, W_enc, b_enc, norms, n_keep, last_cut)


def _select_from_product(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    last_cut: float | torch.Tensor | None,
) -> Codes:
    """As `select`, from all pre-activations, in the SAE's precision."""
    product = x @ W_enc
    pre_dtype = torch.promote_types(product.dtype, b_enc.dtype)
    score_dtype = pre_dtype if norms is None else torch.promote_types(pre_dtype, norms.dtype)
    if n_keep == 0:
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        return Codes(none, none, none.to(score_dtype), none.to(pre_dtype), 0.0)
    matrix = matrix_of(product, b_enc, norms, pre_dtype, score_dtype)
    limit = _floor_key(last_cut, x.device)
    candidates = candidates_above(limit, matrix, n_keep, pre_dtype, or_else_largest=True)
    return keep_largest(candidates, n_keep, len(x), len(b_enc), score_dtype)


def _floor_key(last_cut: float | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """(1,) int32 key of the floor."""
    if last_cut is None:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if isinstance(last_cut, torch.Tensor):
        floor = FLOOR_FRACTION * last_cut.reshape(1)
    else:
        floor = torch.full((1,), FLOOR_FRACTION * last_cut, dtype=torch.float32, device=device)
    return floor.clamp_(min=0).view(torch.int32)
