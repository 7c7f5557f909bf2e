"""How often two latents would fire together by chance, if each keeps its rate and its clusters.

A latent's firings, a series of 0 and 1, are split by scale: what differs between blocks of 4ᵏ⁺¹
tokens, between the blocks of 4ᵏ tokens within these, and so on down to single tokens (a Haar
decomposition). The parts are orthogonal, so with E_k their sums of squares,

    n_ij = n_i n_j / N + Σ_k ⟨part k of i, part k of j⟩

and if the parts of one latent stood at random beside those of the other, as after a circular
shift by many tokens, the sum would have mean 0 and variance Σ_k E_k(i) E_k(j) / d_k, where d_k is
the number of independent parts of scale k. A latent that fires in a few documents alone has its
sum of squares at the scales of a document, where d_k is small; so two such latents meet often by
chance.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse, stats

from sae_lens_matryoshka.tree.gathered import Gathered, SparseArray

_FACTOR = 4  # between the block sizes of neighbouring scales


class Clustering(NamedTuple):
    """How the firings of each latent are spread over the scales.

    Attributes:
        energies: E_k, from single tokens to whole shards.
        degrees: d_k.
        counts: Firings of each latent.
        n_tokens: Number of tokens.
    """

    energies: Float[np.ndarray, "scales d_sae"]
    degrees: Float[np.ndarray, " scales"]
    counts: Int[np.ndarray, " d_sae"]
    n_tokens: int

    def expected(
        self, a: Int[np.ndarray, " pairs"], b: Int[np.ndarray, " pairs"]
    ) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
        """Mean and variance of the number of tokens where both fire, by chance."""
        mean = self.counts[a] * self.counts[b].astype(np.float64) / self.n_tokens
        weighted = self.energies / np.maximum(self.degrees, 1)[:, None]
        variance = sum(weighted[k, a] * self.energies[k, b] for k in range(len(weighted)))
        return mean, np.asarray(variance)


def clustering_of(gathered: Gathered) -> Clustering:
    """Measure how latents cluster, from one look at the codes of each shard."""
    shards = gathered.index.shards
    n_scales = 1
    while _FACTOR**n_scales < min(shard.n_rows for shard in shards):
        n_scales += 1
    # Σ over blocks of (firings)² / (block's tokens), and number of blocks; the last: whole shards
    squares = np.zeros((n_scales + 1, gathered.d_sae))
    n_blocks = np.zeros(n_scales + 1)
    for i in range(len(shards)):
        codes = gathered.codes(i)
        codes.data = np.ones(codes.nnz)
        n_rows = codes.shape[0]
        for k in range(n_scales):
            if k:
                codes = _merged(codes)
            sizes = np.full(codes.shape[0], float(_FACTOR**k))
            sizes[-1] = n_rows - (len(sizes) - 1) * _FACTOR**k
            latents = np.repeat(np.arange(gathered.d_sae), np.diff(codes.indptr))
            weights = codes.data**2 / sizes[codes.indices]
            squares[k] += np.bincount(latents, weights, gathered.d_sae)
            n_blocks[k] += len(sizes)
        squares[-1] += np.asarray(codes.sum(0)) ** 2 / n_rows
        n_blocks[-1] += 1
    counts = gathered.counts
    squares = np.vstack([squares, counts.astype(np.float64) ** 2 / gathered.n_tokens])
    n_blocks = np.append(n_blocks, 1)
    energies = np.maximum(squares[:-1] - squares[1:], 0)
    return Clustering(energies, n_blocks[:-1] - n_blocks[1:], counts, gathered.n_tokens)


def p_values(
    n_both: Int[np.ndarray, " pairs"],
    mean: Float[np.ndarray, " pairs"],
    variance: Float[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """The probability of at least `n_both` tokens together by chance.

    A negative binomial distribution of this mean and variance, or Poisson's where the variance is
    not above the mean; both have heavier tails than a normal one.
    """
    p = stats.poisson.sf(n_both - 1, mean)
    wide = variance > mean * (1 + 1e-9)
    m, v = mean[wide], variance[wide]
    p[wide] = stats.nbinom.sf(n_both[wide] - 1, m**2 / (v - m), m / v)
    return p


def _merged(codes: SparseArray) -> SparseArray:
    """Counts in blocks of `_FACTOR` rows each."""
    n_blocks = -(-codes.shape[0] // _FACTOR)
    merged = sparse.csc_array(
        (codes.data, codes.indices // _FACTOR, codes.indptr), shape=(n_blocks, codes.shape[1])
    )
    merged.sum_duplicates()
    return merged
