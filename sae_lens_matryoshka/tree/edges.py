"""Edges from parent to child, with their evidence and the rules that they have to pass."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae_lens_matryoshka.tree.chance import Clustering, p_values
from sae_lens_matryoshka.tree.coactivation import (
    Eligible,
    Pairs,
    coverage_interval,
    frequent_pairs,
)
from sae_lens_matryoshka.tree.directions import direction_evidence, means_of
from sae_lens_matryoshka.tree.gathered import Gathered, SparseArray
from sae_lens_matryoshka.tree.nearby import nearby_rate

RULES = ("tested", "coverage")


@dataclass(frozen=True)
class Rules:
    """What an edge has to pass; docs/tree.md explains them.

    Attributes:
        edges: "tested", or "coverage" for the first condition alone.
        min_coverage: Least coverage, P(parent | child), of a pair that is tested.
        min_excess: How far, from chance (0) to certainty (1), the lower end of the interval of the
            coverage has to be: (coverage − rate) / (1 − rate), where the rate is the parent's on
            all tokens, and again where it is that near the child (`tree.nearby`).
        min_presence: Least presence of the parent's direction where the child fires.
        max_rank: Greatest rank of the parent's decoder row by cosine with the child's direction.
        alpha: The p-value times the number of pairs looked at has to be below.
    """

    edges: str = "tested"
    min_coverage: float = 0.5
    min_excess: float = 0.6
    min_presence: float = 0.5
    max_rank: int = 5
    alpha: float = 0.05


def find_edges(
    gathered: Gathered,
    W_dec: Float[torch.Tensor, "d_sae d_in"],
    eligible: Eligible,
    clustering: Clustering,
    rules: Rules,
    shifted: bool = False,
) -> pd.DataFrame:
    """Every pair that is tested, with its evidence; `Tree.edges` lists the columns.

    Args:
        gathered: The codes and sums.
        W_dec: The SAE's decoder.
        eligible: Which pairs are looked at.
        clustering: Of the same codes.
        rules: What to pass.
        shifted: Take the children from the shifted copy.
    """
    pairs = frequent_pairs(gathered, eligible, rules.min_coverage, shifted)
    parent, child, n_both = pairs
    n_tokens, counts = gathered.n_tokens, gathered.counts
    coverage = n_both / counts[child]
    low, high = coverage_interval(n_both, counts[child])
    rate = counts[parent] / n_tokens
    nearby = nearby_rate(gathered, pairs, shifted)
    mean, variance = clustering.expected(parent, child)
    p_value = p_values(n_both, mean, variance)
    directions = direction_evidence(means_of(gathered, shifted), W_dec, pairs)
    edges = pd.DataFrame(
        {
            "parent": parent,
            "child": child,
            "n_both": n_both,
            "coverage": coverage,
            "coverage_low": low,
            "coverage_high": high,
            "lift": coverage / rate,
            "excess_low": _excess(low, rate),
            "nearby": nearby,
            "nearby_excess_low": _excess(low, np.nan_to_num(nearby, nan=0.0)),
            "of_parent": n_both / counts[parent],
            "presence": directions.presence,
            "direction_rank": directions.rank,
            "n_expected": mean,
            "n_expected_sd": np.sqrt(variance),
            "p_value": p_value,
            "p_corrected": np.minimum(1, p_value * eligible.n_pairs()),
            "information": information(n_both, counts[parent], counts[child], n_tokens),
        }
    )
    edges["passed"] = passes(edges, rules)
    edges["strongest"] = strongest(edges)
    edges["direct"] = direct(edges, gathered.d_sae)
    order = ["passed", "information"]
    return edges.sort_values(order, ascending=False, kind="stable", ignore_index=True)


def passes(edges: pd.DataFrame, rules: Rules) -> "pd.Series[bool]":
    """Which edges pass."""
    passed = edges["coverage"] >= rules.min_coverage
    if rules.edges == "tested":
        passed &= edges["excess_low"] >= rules.min_excess
        passed &= edges["nearby_excess_low"] >= rules.min_excess
        passed &= edges["p_corrected"] < rules.alpha
        passed &= edges["presence"] >= rules.min_presence
        passed &= edges["direction_rank"] <= rules.max_rank
    return passed


def _excess(coverage: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """How far a coverage is from a rate, 0, to certainty, 1; a rate of 1 can't be exceeded."""
    return np.divide(coverage - rate, 1 - rate, out=np.zeros(len(rate)), where=rate < 1)


def information(
    n_both: Int[np.ndarray, " pairs"],
    n_parent: Int[np.ndarray, " pairs"],
    n_child: Int[np.ndarray, " pairs"],
    n_tokens: int,
) -> Float[np.ndarray, " pairs"]:
    """Mutual information of the parent's and the child's firing on a token, in bits."""
    total = np.zeros(len(n_both))
    for parent_fires in (True, False):
        for child_fires in (True, False):
            p = (n_parent if parent_fires else n_tokens - n_parent) / n_tokens
            c = (n_child if child_fires else n_tokens - n_child) / n_tokens
            if parent_fires and child_fires:
                n = n_both
            elif parent_fires:
                n = n_parent - n_both
            elif child_fires:
                n = n_child - n_both
            else:
                n = n_tokens - n_parent - n_child + n_both
            joint = n / n_tokens
            is_seen = joint > 0
            total[is_seen] += joint[is_seen] * np.log2(joint[is_seen] / (p * c)[is_seen])
    return total


def strongest(edges: pd.DataFrame) -> Bool[np.ndarray, " edges"]:
    """Of the passed edges of each child, the one whose parent says most about it."""
    passed = edges[edges["passed"]]
    return edges.index.isin(passed.groupby("child")["information"].idxmax())


def direct(edges: pd.DataFrame, d_sae: int) -> Bool[np.ndarray, " edges"]:
    """The passed edges without another way from parent to child over passed edges."""
    passed = edges["passed"].to_numpy()
    pairs = Pairs(*(edges[name].to_numpy() for name in ("parent", "child", "n_both")))
    parent, child = pairs.parent[passed], pairs.child[passed]
    ones = np.ones(len(parent))
    step = cast(SparseArray, sparse.csr_array((ones, (parent, child)), shape=(d_sae, d_sae)))
    longer = reached = (step @ step).astype(bool)
    while reached.nnz:
        reached = (reached @ step).astype(bool)
        grown = (longer + reached).astype(bool)
        if grown.nnz == longer.nnz:
            break
        longer = grown
    result = passed.copy()
    if len(parent):
        result[passed] = ~np.asarray(longer.tocsr()[parent, child]).ravel().astype(bool)
    return result
