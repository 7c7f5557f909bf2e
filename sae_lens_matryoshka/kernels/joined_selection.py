"""Exact BatchTopK over a batch whose rows are split over processes.

Each process selects more than its share of the codes with its own backend. The cut of the whole
batch, the `n_keep`-th largest score, is then found digit by digit: positive floats order as the
integers of the same bits, so this is a radix select with digits of up to 11 bits. Each process
makes a histogram of its scores' first digit, the histograms are summed over the processes, and
counting down from the largest digit, the one at which `n_keep` scores are reached is the cut's. The
next histogram covers only the scores that share the digits found so far. float32 takes three small
all-reduces; then an all-gather says how many scores tie at the cut and whether any process
selected too few, in which case all of them select more.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.collectives import gathered

_DIGIT_BITS = 11
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Shares differ by a few per cent, and a code too many costs less than another selection.
_EXTRA = 1.125
_FEW = 64


def select_joined(
    select: Callable[[int], Codes], n_keep: int, n_scores: int, group: dist.ProcessGroup
) -> Codes:
    """This process's part of the `n_keep` largest scores of the joined batch, without padding.

    Ties at the cut go to the lower rank, and within a rank to the code that comes first.

    Args:
        select: Selects the given number of codes from this process's rows.
        n_keep: Number of scores to keep over all processes.
        n_scores: Number of scores of this process, the most that `select` can find.
        group: The processes; each of them calls this.

    Returns:
        The codes; their `cut` is that of this process's own selection.
    """
    n_selected = min(n_scores, int(_EXTRA * n_keep / dist.get_world_size(group)) + _FEW)
    while True:
        codes = select(n_selected)
        keys = _ordered_integers(codes.scores)
        cut, n_at_cut = _nth_largest(keys, 8 * codes.scores.dtype.itemsize - 1, n_keep, group)
        is_tied = keys == cut
        # if all that were selected reach the cut, scores that were not selected may reach it too
        is_short = ((keys >= cut).sum() == n_selected) & (n_selected < n_scores)
        by_rank = gathered(torch.stack([is_tied.sum(), is_short.long()]), group)
        if by_rank[:, 1].any():
            n_selected = min(n_scores, 2 * n_selected)
            continue
        n_before = by_rank[: dist.get_rank(group), 0].sum()
        is_kept = (keys > cut) | (is_tied & (n_before + is_tied.cumsum(0) <= n_at_cut))
        return codes.permuted(is_kept.nonzero().flatten())._replace(n_valid=None)


class JoinedBatchTopK(torch.nn.Module):
    """SAELens' `BatchTopK` over the rows of all processes, dense: the slow twin.

    Args:
        k: Mean number of activations to keep per row.
        group: The processes.
    """

    def __init__(self, k: float, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.k, self._group = k, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, d_sae) activations from pre-activations."""
        acts = x.relu()
        flat = acts.detach().flatten()

        def select(n_keep: int) -> Codes:
            flat_index = flat.topk(n_keep, sorted=False).indices.sort().values
            rows, latents = flat_index // x.shape[-1], flat_index % x.shape[-1]
            return Codes(rows, latents, flat[flat_index], flat[flat_index], cut=0.0)

        n_keep = int(self.k * len(x) * dist.get_world_size(self._group))
        codes = select_joined(select, n_keep, len(flat), self._group)
        is_kept = torch.zeros_like(acts, dtype=torch.bool)
        is_kept[codes.rows, codes.latents] = True
        return acts.where(is_kept, 0)


def _ordered_integers(scores: torch.Tensor) -> torch.Tensor:
    """(n,) int64 that order as the scores, which are not negative; NaN is the largest."""
    integer = _INTEGERS[scores.dtype.itemsize]
    return (scores.contiguous().view(integer) & torch.iinfo(integer).max).long()


def _nth_largest(
    keys: torch.Tensor, n_bits: int, n: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The n-th largest positive key of all processes, the smallest if there are fewer.

    Returns:
        The key, and how many of those equal to it are among the n largest; both ().
    """
    cut = keys.new_zeros(())
    n_left = keys.new_full((), n)
    for shift in reversed(range(0, n_bits, _DIGIT_BITS)):
        is_counted = (keys > 0) & (keys >> shift >> _DIGIT_BITS == cut >> shift >> _DIGIT_BITS)
        n_digits = 2 ** min(_DIGIT_BITS, n_bits - shift)
        digits = (keys >> shift) & (n_digits - 1)
        counts = keys.new_zeros(n_digits).index_add_(0, digits, is_counted.long())
        dist.all_reduce(counts, group=group)
        n_from = counts.flip(0).cumsum(0)  # from the largest digit down
        n_left = torch.minimum(n_left, n_from[-1])
        n_larger_digits = (n_from < n_left).sum()
        n_left = n_left - torch.where(n_larger_digits > 0, n_from[n_larger_digits - 1], 0)
        cut = cut | (n_digits - 1 - n_larger_digits) << shift
    return cut, n_left
