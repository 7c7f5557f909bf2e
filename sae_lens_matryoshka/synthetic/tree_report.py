"""Scores of trees over seeds: a table, a file to compute with, and a picture."""

import csv
import statistics
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from sae_lens_matryoshka.synthetic.trees import MIN_COSINES, RANDOM, TESTED, TreeScore
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

# Score → title and digits, in the order of the table.
_COLUMNS = {
    "n_edges": ("edges", 0),
    "n_judged": ("judged", 0),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "n_parents": ("parents", 0),
    "parents_found": ("found", 2),
    "direct_precision": ("direct: precision", 2),
    "direct_recall": ("direct: recall", 2),
    "strongest_precision": ("strongest", 2),
}
_COUNTS = [name for name in TreeScore._fields if name.startswith("n_")]
_FILES = ("tree.md", "tree.csv", "tree.png")
_MARKERS = ("o", "s", "^", "D", "v", "P")  # told apart without colours too


def write_tree_report(scores: Sequence[TreeScore], out: Path) -> list[str]:
    """Write `tree.md`, `tree.csv` and `tree.png`; returns their names."""
    table, rows, picture = (out / name for name in _FILES)
    with atomic_file(table) as path:
        parts = [
            f"Parents by {by}, matched at a cosine of {cosine}:\n\n{tree_table(scores, by, cosine)}"
            for by, cosine in product(("frequency", "level"), MIN_COSINES)
        ]
        path.write_text("\n\n".join([*parts, null_table(scores)]) + "\n")
    with atomic_file(rows) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, TreeScore._fields)
        writer.writeheader()
        writer.writerows(score._asdict() for score in scores)
    with atomic_file(picture) as path:
        _draw(scores).savefig(path, dpi=120, format="png")
    return list(_FILES)


def tree_table(scores: Sequence[TreeScore], parents: str, min_cosine: float) -> str:
    """Mean, least and greatest value over seeds, a row for each variant and rule."""
    groups: dict[tuple[str, str], list[TreeScore]] = {}
    for score in scores:
        if (score.parents, score.min_cosine) == (parents, min_cosine):
            groups.setdefault((score.variant, score.rule), []).append(score)
    rows = []
    for key, group in groups.items():
        cells = [
            _cell([getattr(score, name) for score in group], digits)
            for name, (_, digits) in _COLUMNS.items()
        ]
        rows.append([*key, *cells, str(len(group))])
    titles = ["variant", "rule", *(title for title, _ in _COLUMNS.values()), "n"]
    return markdown_table(titles, rows, n_text=2)


def null_table(scores: Sequence[TreeScore]) -> str:
    """Pairs that pass of those tested, summed over seeds: of the SAE and where nothing is true."""
    groups: dict[tuple[str, str], list[TreeScore]] = {}
    for score in scores:
        if (score.rule, score.min_cosine) == (TESTED, MIN_COSINES[0]):
            groups.setdefault((score.variant, score.parents), []).append(score)
    rows = []
    for key, group in groups.items():
        n = {name: sum(getattr(score, name) for score in group) for name in _COUNTS}
        cells = [
            f"{n['n_looked_at']:,}",
            f"{n['n_edges']} of {n['n_tested']}",
            f"{n['n_shifted_passed']} of {n['n_shifted_tested']}",
            f"{n['n_shuffled_passed']} of {n['n_shuffled_tested']}",
        ]
        rows.append([*key, *cells])
    titles = ["variant", "parents by", "looked at", "passed", "shifted: passed", "shuffled: passed"]
    return markdown_table(titles, rows, n_text=2)


def _cell(values: Sequence[float | None], digits: int) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    mean, least, most = (f"{f(present):.{digits}f}" for f in (statistics.fmean, min, max))
    return mean if least == most else f"{mean} ({least}–{most})"


def _draw(scores: Sequence[TreeScore]) -> Figure:
    """Precision against the share of the true parents that are found, a point for each SAE."""
    shown = pd.DataFrame(scores)  # a missing share is NaN there, which is not drawn
    shown = shown[(shown["parents"] == "frequency") & (shown["variant"] != RANDOM)]
    shown = shown[shown["min_cosine"] == MIN_COSINES[0]]
    rules = shown["rule"].unique()
    figure = Figure(figsize=(3.2 * len(rules), 3.4), layout="constrained")
    axes = figure.subplots(1, len(rules), sharex=True, sharey=True, squeeze=False)[0]
    for axis, rule in zip(axes, rules, strict=True):
        of_rule = shown[shown["rule"] == rule].groupby("variant", sort=False)
        for marker, (variant, own) in zip(cycle(_MARKERS), of_rule, strict=False):
            x, y = (own[name].astype(float) for name in ("parents_found", "precision"))
            axis.plot(x, y, marker, label=variant)
        axis.set(title=rule, xlabel="true parents found", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("edges that are true")
    axes[0].legend(fontsize=8)
    return figure
