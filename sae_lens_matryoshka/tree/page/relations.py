"""Each latent's edges with their evidence, as the page reads them."""

from typing import Any

import pandas as pd

from sae_lens_matryoshka.tree.page.numbers import rounded

# of an edge, behind the other latent's number; see `Tree.edges`
COLUMNS = (
    "n_both",
    "coverage",
    "coverage_low",
    "coverage_high",
    "excess_low",
    "nearby",
    "nearby_excess_low",
    "of_parent",
    "presence",
    "direction_rank",
    "n_expected",
    "n_expected_sd",
    "p_corrected",
    "information",
    "passed",
    "strongest",
    "direct",
)
_INTEGERS = ("n_both", "direction_rank", "passed", "strongest", "direct")
_N_FAILED, _N_CHILDREN = 5, 300  # of a latent that are listed


class Relations:
    """The edges by latent.

    Args:
        edges: `Tree.edges`, those that passed first and the strongest first.
    """

    def __init__(self, edges: pd.DataFrame):
        passed = edges["passed"].astype(bool)
        kept = passed | (edges[~passed].groupby("child").cumcount() < _N_FAILED).reindex(
            edges.index, fill_value=False
        )
        edges = edges.loc[kept]
        columns = [
            edges[name].astype(int).tolist()
            if name in _INTEGERS
            else [rounded(value, 4) for value in edges[name].tolist()]
            for name in COLUMNS
        ]
        self.parents: dict[int, list[Any]] = {}
        self.children: dict[int, list[Any]] = {}
        latents = (edges[name].tolist() for name in ("parent", "child"))
        is_passed = edges["passed"].tolist()
        for parent, child, ok, *values in zip(*latents, is_passed, *columns, strict=True):
            self.parents.setdefault(child, []).append([parent, *values])
            if ok and len(self.children.setdefault(parent, [])) < _N_CHILDREN:
                self.children[parent].append([child, *values])
