"""Which pairs of latents fire together often, from sparse products of the codes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from sae_lens_matryoshka.tree.gathered import Gathered, shifted_pieces

_BLOCK_ELEMENTS = 2**26  # counts of some parents and all children that are held at a time


class Eligible(NamedTuple):
    """Which latents may be parents of which: those of a lower rank, if they fire more often.

    Attributes:
        rank: The level of each latent, or 0 for all to go by frequency alone.
        by_level: Whether the parent's level has to be an inner one.
        counts: Tokens where each latent fires; a latent with 0 is left out.
    """

    rank: Int[np.ndarray, " d_sae"]
    by_level: bool
    counts: Int[np.ndarray, " d_sae"]

    def mask(
        self, parents: Int[np.ndarray, " parents"], children: Int[np.ndarray, " children"]
    ) -> np.ndarray:
        """For each of the parents and the children, whether the pair is looked at."""
        n, m = self.counts[parents][:, None], self.counts[children][None]
        allowed = (n > m) & (m > 0)
        if self.by_level:
            allowed &= self.rank[parents][:, None] < self.rank[children][None]
        return allowed

    def parents(self) -> Int[np.ndarray, " parents"]:
        """Latents that may be a parent of any."""
        possible = self.counts > 0
        if self.by_level:
            possible &= self.rank < self.rank.max()
        return possible.nonzero()[0]

    def n_pairs(self) -> int:
        """Number of pairs that are looked at."""
        children = (self.counts > 0).nonzero()[0]
        parents = self.parents()
        blocks = np.array_split(parents, max(1, len(parents) * len(children) // _BLOCK_ELEMENTS))
        return sum(int(self.mask(block, children).sum()) for block in blocks)


class Pairs(NamedTuple):
    """Pairs of latents that fire together.

    Attributes:
        parent: Latents.
        child: Latents.
        n_both: Tokens where both fire.
    """

    parent: Int[np.ndarray, " pairs"]
    child: Int[np.ndarray, " pairs"]
    n_both: Int[np.ndarray, " pairs"]


def frequent_pairs(
    gathered: Gathered, eligible: Eligible, min_coverage: float, shifted: bool = False
) -> Pairs:
    """The eligible pairs in which the parent fires on at least a share of the child's tokens.

    Args:
        gathered: The codes.
        eligible: Which pairs to look at.
        min_coverage: The share.
        shifted: Take the children from the shifted copy.
    """
    d_sae = gathered.d_sae
    lengths = [shard.n_rows for shard in gathered.index.shards]
    pieces = list(shifted_pieces(lengths, gathered.shift if shifted else 0))
    parents = eligible.parents()
    needed = np.maximum(1, np.ceil(min_coverage * eligible.counts - 1e-9)).astype(np.int64)
    all_latents = np.arange(d_sae)
    found: list[Pairs] = []
    n_blocks = max(1, -(-len(parents) * d_sae // _BLOCK_ELEMENTS))
    blocks = np.array_split(parents, n_blocks)
    title = "Counting pairs of the shifted copy" if shifted else "Counting pairs"
    with tqdm(desc=title, total=n_blocks * len(pieces), leave=False) as bar:
        for block in blocks:
            n_both = np.zeros((len(block), d_sae), np.int32)
            for piece in pieces:
                add_products(n_both, gathered, piece, block)
                bar.update()
            kept = (n_both >= needed[None]) & eligible.mask(block, all_latents)
            i, child = kept.nonzero()
            found.append(Pairs(block[i], child, n_both[i, child]))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def add_products(
    n_both: Int[np.ndarray, "parents d_sae"],
    gathered: Gathered,
    piece: tuple[int, int, int, int, int],
    parents: Int[np.ndarray, " parents"],
) -> None:
    """Add the number of rows of a piece where a parent and a latent fire together."""
    shard, start, other_shard, other_start, n_rows = piece
    codes = gathered.codes(shard)
    of_parents = codes[:, parents][start : start + n_rows]
    others = codes if other_shard == shard else gathered.codes(other_shard)
    of_all = others[other_start : other_start + n_rows].tocsr()
    of_parents.data, of_all.data = (np.ones(m.nnz, np.int32) for m in (of_parents, of_all))
    product = of_parents.T.tocsr() @ of_all
    starts = product.indptr
    for i in np.diff(starts).nonzero()[0].tolist():
        own = slice(starts[i], starts[i + 1])  # a row at a time stays in the processor's cache
        n_both[i, product.indices[own]] += product.data[own]


def coverage_interval(
    n_both: Int[np.ndarray, " pairs"], n_child: Int[np.ndarray, " pairs"], z: float = 1.96
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """Wilson's 95 % interval for the share of the child's tokens where the parent fires."""
    p = n_both / n_child
    middle = (p + z**2 / (2 * n_child)) / (1 + z**2 / n_child)
    half = z / (1 + z**2 / n_child) * np.sqrt(p * (1 - p) / n_child + (z / (2 * n_child)) ** 2)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
