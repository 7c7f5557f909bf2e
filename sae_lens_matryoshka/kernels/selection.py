"""Exact BatchTopK selection: activations in, the codes that stay non-zero out.

SAELens' BatchTopK ranks every score of a batch, `relu(pre-activation) * decoder norm`, and keeps
the largest `k * B`. Two functions compute that set. `select_full` ranks the dense matrix. The
faster `select_above` looks only at scores above a floor, a little below the last step's cut, and
proves from what it saw that nothing it skipped could have been kept; where it can't, the dense
matrix is ranked after all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Scores of this fraction of the last step's cut and above are looked at: the cut moves by a few per
# cent from batch to batch, and a candidate too many costs far less than a full ranking.
FLOOR_FRACTION = 0.8

# More candidates than this many times those kept cost what a full ranking does, and more memory.
_MAX_CANDIDATES = 16

# On a CPU, a block of pre-activations is filtered in a core's cache; elsewhere it bounds memory.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_DEFAULT_BLOCK_ELEMENTS = 2**27
_MIN_BLOCK_WIDTH = 256


class Codes(NamedTuple):
    """The non-zero codes of a batch of B activations, by row and within a row by latent.

    The Triton kernels don't know how many there are before they are done: they fill up with codes
    of the last latent on the last row, whose score and pre-activation are 0.

    Attributes:
        rows: (n,) int64, the activation's index in the batch.
        latents: (n,) int64.
        scores: (n,) pre-activation times decoder norm, above 0: SAELens' `feature_acts`.
        pre_acts: (n,) pre-activation, above 0: the factor of the decoder row.
        cut: The smallest score that was kept if `k * B` were kept, else 0; a tensor where it is
            still being computed.
        n_used: How many codes, the first ones, don't just fill up, () int64; None if all.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    scores: torch.Tensor
    pre_acts: torch.Tensor
    cut: float | torch.Tensor
    n_used: torch.Tensor | None = None

    def in_order(self, places: torch.Tensor) -> Codes:
        """The same codes, the one at places[i] coming i-th."""
        rows, latents, scores, pre_acts = (tensor[places] for tensor in self[:4])
        return self._replace(rows=rows, latents=latents, scores=scores, pre_acts=pre_acts)


def select(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    floor: float | torch.Tensor | None,
) -> Codes:
    """The `n_keep` largest scores of the batch, by the fastest way that is exact.

    Args:
        x: (B, d_in) encoder input, b_dec already subtracted.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        norms: (d_sae,) factor of each latent's score, or None where scores are pre-activations.
        n_keep: Number of scores to keep, `int(k * B)`; those of 0 do not become codes.
        floor: A score that the cut is expected to exceed, or None if nothing is known of it. A
            wrong guess costs time only.
    """
    codes = None
    # 16-bit scores tie at the cut in nearly every batch, and ties need the full ranking anyway
    if floor is not None and n_keep > 0 and b_enc.dtype.itemsize > 2:
        codes = select_above(x, W_enc, b_enc, norms, n_keep, floor)
    if codes is None:
        codes = select_full(x, W_enc, b_enc, norms, n_keep)
    return codes


def select_full(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
) -> Codes:
    """As `select`, from the dense B × d_sae scores: SAELens' own ranking, ties included."""
    pre_acts = x @ W_enc + b_enc
    scores = (pre_acts.relu() if norms is None else (pre_acts * norms).relu_()).flatten()
    top, indices = torch.topk(scores, n_keep)
    indices = indices[~(top <= 0)].sort().values  # NaN stays, so that the loss shows it
    cut = top[-1].item() if n_keep else 0.0
    rows, latents = indices // W_enc.shape[1], indices % W_enc.shape[1]
    return Codes(rows, latents, scores[indices], pre_acts.flatten()[indices], cut)


def select_above(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    floor: float | torch.Tensor,
) -> Codes | None:
    """As `select`, from the scores above `floor`; None where those do not settle the set."""
    d_sae = W_enc.shape[1]
    # A product at or below its limit scores at most `bound`: rounding keeps the order of numbers,
    # so the same operations on the limits bound what they give on anything below.
    limits = (floor - b_enc) if norms is None else floor / norms - b_enc
    at_limits = limits + b_enc
    if norms is not None:
        at_limits = torch.where(norms == 0, 0.0, at_limits * norms)  # not inf · 0
    bound = at_limits.max().item()

    keys, products, n_candidates = [], [], 0
    for start, stop in _blocks(x, d_sae):
        product = x @ W_enc[:, start:stop]
        # NaN is neither above nor below: let it through, so that the loss shows it
        hits = _flat_nonzero((product <= limits[start:stop]).logical_not_())
        n_candidates += len(hits)
        if n_candidates > _MAX_CANDIDATES * n_keep:
            return None
        products.append(product.flatten()[hits])
        width = stop - start
        keys.append(torch.div(hits, width, rounding_mode="floor") * d_sae + hits % width + start)
    keys, order = torch.cat(keys).sort()
    latents = keys % d_sae
    pre_acts = torch.cat(products)[order] + b_enc[latents]
    scores = pre_acts if norms is None else pre_acts * norms[latents]

    kept = _flat_nonzero((scores <= 0).logical_not_())
    if len(kept) >= n_keep:
        cut = torch.topk(scores, n_keep).values[-1].item()
        kept = _flat_nonzero(scores >= cut)
        # Scores that tie at the cut are SAELens' to choose from, by ranking all of them.
        if not cut > bound or len(kept) != n_keep:
            return None
    elif bound <= 0:
        cut = 0.0
    else:
        return None
    keys, latents = keys[kept], latents[kept]
    return Codes(keys // d_sae, latents, scores[kept], pre_acts[kept], cut)


def _blocks(x: torch.Tensor, d_sae: int) -> list[tuple[int, int]]:
    elements = _BLOCK_ELEMENTS.get(x.device.type, _DEFAULT_BLOCK_ELEMENTS)
    width = max(_MIN_BLOCK_WIDTH, elements // max(1, len(x)))
    return [(start, min(start + width, d_sae)) for start in range(0, d_sae, width)]


def _flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    if mask.device.type != "cpu":
        return mask.flatten().nonzero().flatten()
    # numpy skips runs of zeros several at a time; torch's nonzero took seven times as long
    return torch.from_numpy(mask.numpy().reshape(-1).nonzero()[0])
