"""The tree: latents, edges and their evidence."""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.files import atomic_file

_FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class Tree:
    """Which latents of an SAE specialise which.

    Attributes:
        latents: A row per latent, whose number is the index:
            level: 0 is the innermost; 0 for all latents of an SAE without levels.
            n_fired: Tokens where it fires.
            density: Their share.
            mean_activation, max_activation: Where it fires; 0 if it never does.
            n_children: Of how many latents it is a parent.
            parent: Its strongest parent, −1 if it has none.
        edges: A row per pair that was tested, those that passed first, the strongest first:
            parent, child: Latents.
            n_both: Tokens where both fire.
            coverage: Share of the child's tokens where the parent fires.
            coverage_low, coverage_high: Wilson's 95 % interval of `coverage`.
            lift: `coverage` / density of the parent.
            excess_low: (`coverage_low` − density of the parent) / (1 − density of the parent).
            nearby: Share of the silent tokens near the child's where the parent fires; NaN if there
                are none (see `tree.nearby`).
            nearby_excess_low: As `excess_low`, with `nearby` for the density of the parent.
            of_parent: Share of the parent's tokens where the child fires.
            presence: How far activations go along the parent's decoder row where the child fires;
                0 as on all tokens, 1 as where the parent fires.
            direction_rank: Place of the parent's decoder row by cosine with the child's direction.
            n_expected, n_expected_sd: `n_both` by chance, and its standard deviation.
            p_value: Of `n_both`, against chance.
            p_corrected: `p_value` times the number of pairs looked at.
            information: Mutual information of the two, in bits per token.
            passed: Whether all rules hold.
            strongest: Whether it is the passed edge of its child with the most `information`.
            direct: Whether no other way over passed edges leads from the parent to the child.
        summary: Numbers of tokens, of latents and of pairs looked at, tested and passed, and how
            many of the shifted copy's were tested and passed.
        settings: What the tree was built from, and the rules.
    """

    latents: pd.DataFrame
    edges: pd.DataFrame
    summary: Mapping[str, int]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        s = self.summary
        return f"Tree({s['n_latents']} latents, {s['n_passed']} edges)"

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary, and the strongest families."""
        # report reads trees, so it can't be imported above
        from sae_lens_matryoshka.tree.report import family_lines, summary_lines

        lines = [*summary_lines(self), "", *family_lines(self, n_families=5)]
        return f"<pre>{html.escape(chr(10).join(lines))}</pre>"

    def parents(self, latent: int) -> list[int]:
        """The parents of a latent, the strongest first."""
        return self._passed("child", latent)["parent"].tolist()

    def children(self, latent: int) -> list[int]:
        """The latents that have this one among their parents, the strongest first."""
        return self._passed("parent", latent)["child"].tolist()

    def siblings(self, latent: int) -> list[int]:
        """The other children of its strongest parent, the strongest first."""
        parents = self.parents(latent)
        return [child for child in self.children(parents[0]) if child != latent] if parents else []

    def roots(self) -> list[int]:
        """Latents with children and without parents, those with the most children first."""
        is_root = (self.latents["n_children"] > 0) & (self.latents["parent"] < 0)
        roots = self.latents[is_root].sort_values("n_children", ascending=False, kind="stable")
        return roots.index.tolist()

    def edge(self, parent: int, child: int) -> pd.Series:
        """The evidence of a pair that was tested, whether or not it passed.

        Raises:
            ValueError: the pair was not tested.
        """
        found = self.edges[(self.edges["parent"] == parent) & (self.edges["child"] == child)]
        if found.empty:
            raise ValueError(f"latent {parent} as the parent of {child} was not tested.")
        return found.iloc[0]

    def to_networkx(self) -> nx.DiGraph:
        """The passed edges, from parent to child, over all latents, with their evidence."""
        graph = nx.DiGraph()
        rows = self.latents.to_dict("records")
        graph.add_nodes_from(zip(self.latents.index.tolist(), rows, strict=True))
        for row in self.edges[self.edges["passed"]].to_dict("records"):
            graph.add_edge(row.pop("parent"), row.pop("child"), **row)
        return graph

    def save(self, path: Path | str) -> None:
        """Write a JSON file, whole or not at all, with six digits of each number."""
        values = {
            "format_version": _FORMAT_VERSION,
            "settings": dict(self.settings),
            "summary": dict(self.summary),
            "latents": _columns(self.latents),
            "edges": _columns(self.edges),
        }
        with atomic_file(Path(path)) as unfinished:
            unfinished.write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "Tree":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, broken, or of a later version of this package.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version = values["format_version"]
            if version != _FORMAT_VERSION:
                raise ValueError(f"its format_version is {version!r}, not {_FORMAT_VERSION}")
            latents, edges = (
                pd.DataFrame(values[name]).apply(pd.to_numeric) for name in ("latents", "edges")
            )
            latents.index.name = "latent"
            return cls(latents, edges, values["summary"], values["settings"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} can't be read: {error}.") from error

    def _passed(self, column: str, latent: int) -> pd.DataFrame:
        if latent not in self.latents.index:
            raise invalid_option("latent", latent, f"0 to {len(self.latents) - 1}")
        return self.edges[self.edges["passed"] & (self.edges[column] == latent)]


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    """The columns of a table for JSON, which has no NaN, with six digits of each number."""
    columns: dict[str, list[Any]] = {}
    for name, column in table.to_dict("list").items():
        if pd.api.types.is_float_dtype(table[name]):
            column = [None if value != value else float(f"{value:.6g}") for value in column]
        columns[str(name)] = column
    return columns
