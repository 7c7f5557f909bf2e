"""The direction in which activations differ where a latent fires, and whose decoder row it is."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from sae_lens_matryoshka.tree.coactivation import Pairs
from sae_lens_matryoshka.tree.gathered import Gathered

_BLOCK_ELEMENTS = 2**24  # cosines of some children with all decoder rows


class Directions(NamedTuple):
    """Evidence of directions for pairs.

    Attributes:
        rank: Place of the parent's decoder row among all rows but the child's own, ordered by
            cosine with the child's direction; 1 is the nearest.
        presence: How far activations go along the parent's decoder row where the child fires: 0 is
            the mean of all tokens, 1 the mean of those where the parent fires.
    """

    rank: Int[np.ndarray, " pairs"]
    presence: Float[np.ndarray, " pairs"]


class Means(NamedTuple):
    """Mean activation where each latent fires, less the mean activation of all tokens."""

    parents: Float[torch.Tensor, "d_sae d_in"]
    children: Float[torch.Tensor, "d_sae d_in"]


def means_of(gathered: Gathered, shifted: bool = False) -> Means:
    """The means; those of the children from the shifted copy if `shifted`.

    A latent that never fires has 0.
    """
    sums = gathered.sums
    mean = torch.from_numpy(sums["total"] / gathered.n_tokens).float()
    parents = _means(sums["sums"], gathered.counts, mean)
    if not shifted:
        return Means(parents, parents)
    # the sums of the shifted copy lack the rows that stand beside the end of the data
    counts = np.zeros(gathered.d_sae, np.int64)
    n_left = gathered.n_tokens - gathered.shift
    for i, shard in enumerate(gathered.index.shards):
        codes = gathered.codes(i)[: max(0, min(n_left, shard.n_rows))]
        counts += np.diff(codes.indptr)
        n_left -= shard.n_rows
    return Means(parents, _means(sums["shifted"], counts, mean))


def direction_evidence(
    means: Means, W_dec: Float[torch.Tensor, "d_sae d_in"], pairs: Pairs
) -> Directions:
    """Compare the direction of each child with its parent's decoder row.

    The child's direction is the difference of the mean activations where it fires and where it
    does not, which is its row of `means.children` up to a factor.
    """
    rows = torch.nn.functional.normalize(W_dec.detach().cpu().float(), dim=1)
    rank = np.empty(len(pairs.parent), np.int64)
    order = np.argsort(pairs.child, kind="stable")
    children, firsts = np.unique(pairs.child[order], return_index=True)
    ends = np.append(firsts, len(order))
    size = max(1, _BLOCK_ELEMENTS // len(rows))
    for start in range(0, len(children), size):
        block = torch.from_numpy(children[start : start + size])
        cosines = torch.nn.functional.normalize(means.children[block], dim=1) @ rows.T
        cosines[torch.arange(len(block)), block] = -torch.inf
        chosen = order[ends[start] : ends[min(start + size, len(children))]]
        i = torch.from_numpy(np.searchsorted(children, pairs.child[chosen]) - start)
        own = cosines[i, torch.from_numpy(pairs.parent[chosen])]
        rank[chosen] = _n_above(cosines, i, own).numpy() + 1
    parent, child = (torch.from_numpy(latents) for latents in pairs[:2])
    of_parent = _along(means.parents, rows, parent, parent)
    presence = _along(means.children, rows, child, parent) / of_parent
    return Directions(rank, presence.where(of_parent > 0, torch.nan).numpy())


def _n_above(
    cosines: Float[torch.Tensor, "children d_sae"],
    i: Int[torch.Tensor, " pairs"],
    own: Float[torch.Tensor, " pairs"],
) -> Int[torch.Tensor, " pairs"]:
    """How many cosines of row i exceed a value, for each pair."""
    n_rows, width = cosines.shape
    # one ascending line of all rows: cosines are in [−1, 1], and the child's own is −inf
    offsets = 4.0 * torch.arange(n_rows, dtype=torch.float64)
    line = (cosines.double().clamp(min=-2).sort(dim=1).values + offsets[:, None]).flatten()
    places = torch.searchsorted(line, own.double() + offsets[i], right=True)
    return (i + 1) * width - places


def _along(
    means: torch.Tensor, rows: torch.Tensor, latents: torch.Tensor, parents: torch.Tensor
) -> Float[torch.Tensor, " pairs"]:
    """⟨mean of a latent, decoder row of a parent⟩ for each pair, in bounded memory."""
    size = max(1, _BLOCK_ELEMENTS // means.shape[1])
    return torch.cat(
        [
            (means[a] * rows[b]).sum(1)
            for a, b in zip(latents.split(size), parents.split(size), strict=True)
        ]
    )


def _means(
    sums: np.ndarray, counts: Int[np.ndarray, " d_sae"], mean: torch.Tensor
) -> Float[torch.Tensor, "d_sae d_in"]:
    n = torch.from_numpy(counts)[:, None]
    return (torch.from_numpy(sums) / n.clamp(min=1) - mean).where(n > 0, 0.0)
