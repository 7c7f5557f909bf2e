"""Exact BatchTopK selection in PyTorch: activations in, the codes that stay non-zero out.

SAELens' BatchTopK ranks every score of a batch, `relu(pre-activation) * decoder norm`, and keeps
the largest `k * B`. Two functions compute that set. `select_full` ranks the dense matrix. The
faster `select_above` looks only at scores above a floor, a little below the last step's cut, and
proves that no score it skipped could have been kept; where it can't, `select_full` decides.
"""

import torch

from sae_lens_matryoshka.kernels.codes import Codes

# The floor, as a fraction of the last step's cut: the cut moves by a few per cent from batch to
# batch, and a candidate too many costs far less than a full ranking.
FLOOR_FRACTION = 0.8

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
    floor: float | torch.Tensor | None,
) -> Codes:
    """The `n_keep` largest scores of the batch, by the fastest exact way.

    Args:
        x: (B, d_in) encoder input, b_dec already subtracted.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        norms: (d_sae,) factor of each latent's score, or None where scores are pre-activations.
        n_keep: Number of scores to keep, `int(k * B)`; scores of 0 never become codes.
        floor: A guess below the cut, or None where the cut is not known. A wrong guess only costs
            time.
    """
    codes = None
    # 16-bit scores tie at the cut in nearly every batch, and ties need the full ranking
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

    The proof: products x @ W_enc at or below their latent's limit are skipped. Norms are not
    negative and rounding is monotonic, so no skipped score exceeds `bound`, the largest score that
    a limit itself would have. The set is therefore settled if the `n_keep`-th largest candidate
    scores above `bound` and no other ties with it, or if fewer than `n_keep` candidates are
    positive and `bound` is at most 0.
    """
    d_sae = W_enc.shape[1]
    limits = (floor - b_enc) if norms is None else floor / norms - b_enc
    at_limits = limits + b_enc
    if norms is not None:
        at_limits = torch.where(norms == 0, 0.0, at_limits * norms)  # not inf · 0
    bound = at_limits.max().item()

    blocks, products, n_candidates = [], [], 0
    for start, stop in _blocks(x, d_sae):
        product = x @ W_enc[:, start:stop]
        # not `>`: NaN has to become a candidate, so that the loss shows it
        hits = _flat_nonzero((product <= limits[start:stop]).logical_not_())
        n_candidates += len(hits)
        if n_candidates > _MAX_CANDIDATES * n_keep:
            return None
        products.append(product.flatten()[hits])
        width = stop - start
        rows = torch.div(hits, width, rounding_mode="floor")
        blocks.append(rows * d_sae + hits % width + start)
    flat_index, permutation = torch.cat(blocks).sort()
    latents = flat_index % d_sae
    pre_acts = torch.cat(products)[permutation] + b_enc[latents]
    scores = pre_acts if norms is None else pre_acts * norms[latents]

    kept = _flat_nonzero((scores <= 0).logical_not_())
    if len(kept) >= n_keep:
        cut = torch.topk(scores, n_keep).values[-1].item()
        kept = _flat_nonzero(scores >= cut)
        # among scores that tie at the cut, only SAELens' own ranking tells which are kept
        if not cut > bound or len(kept) != n_keep:
            return None
    elif bound <= 0:
        cut = 0.0
    else:
        return None
    return Codes(flat_index[kept] // d_sae, latents[kept], scores[kept], pre_acts[kept], cut)


def _blocks(x: torch.Tensor, d_sae: int) -> list[tuple[int, int]]:
    """Ranges of latents whose pre-activations are computed at once."""
    elements = _BLOCK_ELEMENTS.get(x.device.type, _DEFAULT_BLOCK_ELEMENTS)
    width = max(_MIN_BLOCK_WIDTH, elements // max(1, len(x)))
    return [(start, min(start + width, d_sae)) for start in range(0, d_sae, width)]


def _flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices where `mask` is true."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero().flatten()
    # numpy skips runs of zeros several at a time; torch's nonzero took seven times as long
    return torch.from_numpy(mask.numpy().reshape(-1).nonzero()[0])
