"""What the ways of selecting share: limits below which scores are skipped, codes above the cut."""

import torch

from sae_lens_matryoshka.kernels.codes import Codes

# The floor, as a fraction of the last step's cut: the cut moves by a few per cent from batch to
# batch, and a candidate too many costs far less than a full ranking.
FLOOR_FRACTION = 0.8
SCREEN_FRACTIONS = (0.85, 0.7)  # tried one after the other: a screen costs a fraction of a ranking


def skip_limits(
    floor: float | torch.Tensor, b_enc: torch.Tensor, norms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Limits below which a product x @ W_enc can be skipped.

    Norms are not negative and rounding is monotonic, so no skipped product has a larger score than
    its latent's limit would have.

    Returns:
        (d_sae,) limits, at about the score `floor`; () the largest score at a limit, NaN if one is.
    """
    if norms is None:
        limits = floor - b_enc
        return limits, (limits + b_enc).max()
    has_no_decoder = norms == 0  # and scores 0; neither 0 / 0 nor inf · 0
    limits = torch.where(has_no_decoder, torch.inf, floor / norms - b_enc)
    at_limits = torch.where(has_no_decoder, 0.0, (limits + b_enc) * norms)
    return limits, at_limits.max()


def settle(
    rows: torch.Tensor,
    latents: torch.Tensor,
    products: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    bound: float,
) -> Codes | None:
    """The `n_keep` largest scores of the candidates; None where they do not settle the set.

    No score that is not a candidate exceeds `bound`. The set is therefore settled if the
    `n_keep`-th largest candidate scores above `bound` and no other ties with it, or if fewer than
    `n_keep` candidates are positive and `bound` is at most 0.

    Args:
        rows: (n,) row of each candidate, in any order.
        latents: (n,).
        products: (n,) x @ W_enc.
        b_enc: (d_sae,).
        norms: (d_sae,), or None where scores are pre-activations.
        n_keep: Number of scores to keep.
        bound: Upper bound of every score that is not a candidate.
    """
    pre_acts = products + b_enc[latents]
    scores = pre_acts if norms is None else pre_acts * norms[latents]
    kept = flat_nonzero((scores <= 0).logical_not_())
    if len(kept) >= n_keep:
        cut = nth_largest(scores, n_keep)
        kept = flat_nonzero(scores >= cut)
        # among scores that tie at the cut, only SAELens' own ranking tells which are kept
        if not cut > bound or len(kept) != n_keep:
            return None
    elif bound <= 0:
        cut = 0.0
    else:
        return None
    flat_index, order = (rows[kept].long() * len(b_enc) + latents[kept]).sort()
    kept = kept[order]
    return Codes(flat_index // len(b_enc), latents[kept].long(), scores[kept], pre_acts[kept], cut)


def nth_largest(values: torch.Tensor, n: int) -> float:
    """The n-th largest of at least n values; NaN counts as the largest."""
    if values.device.type == "cpu":  # numpy's partition takes a tenth of the time of torch's topk
        partitioned = values.numpy().copy()
        partitioned.partition(len(values) - n)
        return partitioned[len(values) - n].item()
    return torch.topk(values, n).values[-1].item()


def top_of_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(B, k) where the k largest of each row of (B, n) are, in any order."""
    if scores.device.type == "cpu" and scores.dtype.itemsize > 2:  # twice as fast as torch's topk
        order = scores.numpy().argpartition(scores.shape[1] - k, axis=1)
        return torch.from_numpy(order)[:, -k:]
    return torch.topk(scores, k, sorted=False).indices


def flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices where `mask` is true."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero().flatten()
    # numpy skips runs of zeros several at a time; torch's nonzero took seven times as long
    return torch.from_numpy(mask.numpy().reshape(-1).nonzero()[0])
