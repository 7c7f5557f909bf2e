"""Exact BatchTopK selection in PyTorch: activations in, the codes that stay non-zero out.

SAELens' BatchTopK ranks every score of a batch, `relu(pre-activation) * decoder norm`, and keeps
the largest `k * B`. `select_full` does the same. Two faster ways look only at scores that exceed a
floor, a little below the last step's cut, and prove that no score they skipped could have been
kept; where they can't, `select_full` decides. `select_above` computes all pre-activations in the
SAE's precision; `screen.select_screened` computes them in bfloat16, and few of them again.
"""

import torch

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.cut import (
    FLOOR_FRACTION,
    SCREEN_FRACTIONS,
    flat_nonzero,
    settle,
    skip_limits,
)
from sae_lens_matryoshka.kernels.screen import Selection, can_screen, pays_off, select_screened

_MIN_SCREENED_WEIGHTS = 2**19  # for fewer, what the screen adds costs what it saves

# More candidates than this many times `n_keep` cost as much as a full ranking, and more memory.
_MAX_CANDIDATES = 16

# On a CPU, a block of pre-activations is filtered in a core's cache; elsewhere it bounds memory.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_DEFAULT_BLOCK_ELEMENTS = 2**27
_MIN_BLOCK_WIDTH = 256


def select(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    last_cut: float | torch.Tensor | None,
    selection: Selection = "auto",
) -> Codes:
    """The `n_keep` largest scores of the batch, by the fastest exact way.

    Args:
        x: (B, d_in) encoder input, b_dec already subtracted.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        norms: (d_sae,) factor of each latent's score, or None where scores are pre-activations.
        n_keep: Number of scores to keep, `int(k * B)`; scores of 0 never become codes.
        last_cut: The smallest score kept of another batch, or None. One far from this batch's only
            costs time.
        selection: "screen" or "product" to use that way; "auto" for the one that is faster here.
    """
    if isinstance(last_cut, torch.Tensor):  # the SAE may have moved since
        last_cut = last_cut.to(x.device)
    # 16-bit scores tie at the cut in nearly every batch, and ties need the full ranking
    if last_cut is not None and n_keep > 0 and b_enc.dtype.itemsize > 2:
        is_screened = last_cut > 0 and _is_screened(x, W_enc, selection)
        for way, fraction in _SCREEN_FIRST if is_screened else _ABOVE:
            codes = way(x, W_enc, b_enc, norms, n_keep, fraction * last_cut)
            if codes is not None:
                return codes
    return select_full(x, W_enc, b_enc, norms, n_keep)


def _is_screened(x: torch.Tensor, W_enc: torch.Tensor, selection: Selection) -> bool:
    if x.device.type != "cpu" or not can_screen(x, W_enc, selection):
        return False
    return selection == "screen" or (W_enc.numel() >= _MIN_SCREENED_WEIGHTS and pays_off())


def select_full(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
) -> Codes:
    """As `select`, from the dense B × d_sae scores: SAELens' own ranking, tie-breaking included."""
    pre_acts = x @ W_enc + b_enc
    scores = (pre_acts.relu() if norms is None else (pre_acts * norms).relu_()).flatten()
    top, flat_index = torch.topk(scores, n_keep)
    flat_index = flat_index[~(top <= 0)].sort().values  # NaN stays and shows in the loss
    cut = top[-1].item() if n_keep else 0.0
    rows, latents = flat_index // W_enc.shape[1], flat_index % W_enc.shape[1]
    return Codes(rows, latents, scores[flat_index], pre_acts.flatten()[flat_index], cut)


def select_above(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    floor: float | torch.Tensor,
) -> Codes | None:
    """As `select`, from the scores above `floor`; None where these do not settle the set.

    Products x @ W_enc at or below their latent's limit are skipped; see `cut.skip_limits`.
    """
    d_sae = W_enc.shape[1]
    limits, bound = skip_limits(floor, b_enc, norms)
    rows, latents, products, n_candidates = [], [], [], 0
    for start, stop in _blocks(x, d_sae):
        product = x @ W_enc[:, start:stop]
        # not `>`: NaN has to become a candidate, so that the loss shows it
        hits = flat_nonzero((product <= limits[start:stop]).logical_not_())
        n_candidates += len(hits)
        if n_candidates > _MAX_CANDIDATES * n_keep:
            return None
        products.append(product.flatten()[hits])
        width = stop - start
        row = torch.div(hits, width, rounding_mode="floor")
        rows.append(row)
        latents.append(hits - row * width + start)
    candidates = (torch.cat(rows), torch.cat(latents), torch.cat(products))
    return settle(*candidates, b_enc, norms, n_keep, bound.item())


_ABOVE = ((select_above, FLOOR_FRACTION),)
_SCREEN_FIRST = (*((select_screened, fraction) for fraction in SCREEN_FRACTIONS), *_ABOVE)


def _blocks(x: torch.Tensor, d_sae: int) -> list[tuple[int, int]]:
    """Ranges of latents whose pre-activations are computed at once."""
    elements = _BLOCK_ELEMENTS.get(x.device.type, _DEFAULT_BLOCK_ELEMENTS)
    width = max(_MIN_BLOCK_WIDTH, elements // max(1, len(x)))
    return [(start, min(start + width, d_sae)) for start in range(0, d_sae, width)]
