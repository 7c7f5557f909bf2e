"""How often a parent fires near its child's tokens, where the child is silent.

Two latents of one topic fire in the same documents, and so together, without one specialising the
other. If they are independent within these documents, the parent fires as often on the tokens
around those of the child as on these themselves. Tokens are near each other here if they are in
one block of 64.

With c_b the child's and q_b the parent's tokens in block b of L tokens, and m_b those of both,
the share of the silent tokens near the child where the parent fires, a block counted once for
each token of the child in it, is

    Σ_b c_b (q_b − m_b) / Σ_b c_b (L − c_b)

and m_b, which would need a count for each pair and block, is taken as coverage · c_b.
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse

from sae_lens_matryoshka.tree.coactivation import Pairs
from sae_lens_matryoshka.tree.gathered import Gathered, shifted_pieces

BLOCK = 64  # tokens
_ELEMENTS = 2**24  # of products that are summed at a time


def nearby_rate(
    gathered: Gathered, pairs: Pairs, shifted: bool = False
) -> Float[np.ndarray, " pairs"]:
    """The share above for each pair; NaN where the child is silent on no token near its own."""
    n_child = gathered.counts[pairs.child]
    crossed = np.zeros(len(n_child))  # Σ c_b q_b
    silent, squares = np.zeros(gathered.d_sae), np.zeros(gathered.d_sae)
    lengths = [shard.n_rows for shard in gathered.index.shards]
    for piece in shifted_pieces(lengths, gathered.shift if shifted else 0):
        parents = _block_counts(gathered, piece.shard, piece.start, piece.n_rows)
        children = parents
        if shifted:
            children = _block_counts(
                gathered, piece.shifted_shard, piece.shifted_start, piece.n_rows
            )
        crossed += _row_products(parents, pairs.parent, children, pairs.child)
        sizes = torch.full((children.shape[1],), float(BLOCK))
        sizes[-1] = piece.n_rows - (len(sizes) - 1) * BLOCK
        silent += (children * (sizes - children)).sum(1).numpy()
        squares += children.pow(2).sum(1).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        of_both = pairs.n_both / n_child * squares[pairs.child]
        rate = (crossed - of_both) / silent[pairs.child]
    return np.where(silent[pairs.child] > 0, np.clip(rate, 0, 1), np.nan)


def _block_counts(
    gathered: Gathered, shard: int, start: int, n_rows: int
) -> Float[torch.Tensor, "d_sae blocks"]:
    """Tokens of each block where each latent fires."""
    codes = gathered.codes(shard)[start : start + n_rows]
    shape = (-(-n_rows // BLOCK), codes.shape[1])
    ones = np.ones(codes.nnz, np.float32)
    blocks = sparse.csc_array((ones, codes.indices // BLOCK, codes.indptr), shape=shape)
    return torch.from_numpy(blocks.T.toarray())


def _row_products(
    a: torch.Tensor, rows_a: np.ndarray, b: torch.Tensor, rows_b: np.ndarray
) -> Float[np.ndarray, " pairs"]:
    """⟨row of a, row of b⟩ for each pair of rows."""
    size = max(1, _ELEMENTS // a.shape[1])
    indices = (torch.from_numpy(rows).split(size) for rows in (rows_a, rows_b))
    parts = [(a[i] * b[j]).sum(1) for i, j in zip(*indices, strict=True)]
    return torch.cat(parts).double().numpy() if parts else np.zeros(0)
