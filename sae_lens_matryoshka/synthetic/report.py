"""The scores of all runs, over seeds: a table, files to compute with, and plots."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sae_lens import SAE
from sae_lens.util import cosine_similarities

from sae_lens_matryoshka.synthetic.models import TOY, Benchmark, parents_of
from sae_lens_matryoshka.synthetic.runs import Run, run_folder
from sae_lens_matryoshka.synthetic.scores import match
from sae_lens_matryoshka.util.files import atomic_file

# Score → title and digits, in the order of the table.
_COLUMNS = {
    "features_recovered": ("recovered", 1),
    "mcc": ("MCC", 3),
    "f1": ("F1", 3),
    "absorption": ("absorption", 3),
    "parent_alone_miss": ("parent miss", 3),
    "leakage": ("leakage", 3),
    "explained_variance": ("variance expl.", 3),
    "l0": ("L0", 2),
    "dead_latents": ("dead", 1),
}
_PANELS = {
    **{name: title for name, (title, _) in _COLUMNS.items()},
    "precision": "precision",
    "recall": "recall",
    "uniqueness": "uniqueness",
    "mean_max_decoder_cosine": "largest cosine",
    "l0_training": "L0 in training",
}
_COLORS = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


class Spread(NamedTuple):
    """One score of one variant over seeds; `std` is None from fewer than two."""

    mean: float
    std: float | None
    n: int


class Report(NamedTuple):
    """The table as Markdown, and the names of the files in the output folder."""

    table: str
    files: list[str]


def write_report(
    runs: Sequence[Run], out: Path, order: Sequence[str], benchmark: Benchmark
) -> Report:
    """Write `scores.csv`, `summary.json`, `table.md`, `scores.png` and, for toy, the decoders.

    Args:
        runs: What to tell of.
        out: Where they are, and where the files go.
        order: Variants in the order to show; others follow by name.
        benchmark: What they were trained on.
    """
    by_variant: dict[str, list[Run]] = {name: [] for name in order}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    by_variant = {name: group for name, group in by_variant.items() if group}
    spreads = {name: summarize(group) for name, group in by_variant.items()}
    text = table(spreads)
    files = ["table.md", "scores.csv", "summary.json", "scores.png"]
    with atomic_file(out / "scores.csv") as path:
        _write_csv(path, [run for group in by_variant.values() for run in group])
    with atomic_file(out / "summary.json") as path:
        summary = {
            "benchmark": benchmark.name,
            "variants": {
                name: {
                    "seeds": [run.seed for run in group],
                    "settings": {k: v for k, v in group[0].settings.items() if k != "seed"},
                    "seconds": statistics.fmean(run.seconds for run in group),
                    "scores": {key: s._asdict() for key, s in spreads[name].items()},
                }
                for name, group in by_variant.items()
            },
        }
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    with atomic_file(out / "table.md") as path:
        path.write_text(text + "\n")
    with atomic_file(out / "scores.png") as path:
        _draw_scores(path, spreads)
    if benchmark.name == TOY.name:
        seed = min(run.seed for run in runs)
        with atomic_file(out / "decoder_cosines.png") as path:
            _draw_cosines(
                path, out, [v for v in by_variant if run_folder(out, v, seed).exists()], seed
            )
        files.append("decoder_cosines.png")
    return Report(text, files)


def summarize(runs: Sequence[Run]) -> dict[str, Spread]:
    """Every score of one variant's runs, over those that have it."""
    spreads = {}
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        values = [run.scores[name] for run in runs if name in run.scores]
        std = statistics.stdev(values) if len(values) > 1 else None
        spreads[name] = Spread(statistics.fmean(values), std, len(values))
    return spreads


def table(spreads: dict[str, dict[str, Spread]]) -> str:
    """Means and standard deviations as a Markdown table, a row per variant."""
    n_seeds = {name: max(s.n for s in scores.values()) for name, scores in spreads.items()}
    lines = [
        "| " + " | ".join(["variant", *(title for title, _ in _COLUMNS.values()), "n"]) + " |",
        "|---|" + "---:|" * (len(_COLUMNS) + 1),
    ]
    for name, scores in spreads.items():
        cells = [_cell(scores.get(key), d, n_seeds[name]) for key, (_, d) in _COLUMNS.items()]
        lines.append("| " + " | ".join([name, *cells, str(n_seeds[name])]) + " |")
    lines += ["", "± is the standard deviation over n seeds."]
    return "\n".join(lines)


def _cell(spread: Spread | None, digits: int, n_seeds: int) -> str:
    if spread is None:
        return ""
    std = "" if spread.std is None else f" ± {spread.std:.{digits}f}"
    few = "" if spread.n == n_seeds else f" ({spread.n} of {n_seeds})"
    return f"{spread.mean:.{digits}f}{std}{few}"


def _write_csv(path: Path, runs: Sequence[Run]) -> None:
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *names, "seconds"])
        for run in runs:
            scores = [run.scores.get(name, "") for name in names]
            writer.writerow([run.variant, run.seed, *scores, run.seconds])


def _draw_scores(path: Path, spreads: dict[str, dict[str, Spread]]) -> None:
    """A panel per score: a bar per variant, with its standard deviation."""
    n_columns = 5
    n_rows = math.ceil(len(_PANELS) / n_columns)
    height = 1.1 + 0.25 * len(spreads)
    figure = Figure(figsize=(15, n_rows * height), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    names = list(spreads)
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(names))]
    for i, (key, title) in enumerate(_PANELS.items()):
        scores = [spreads[name].get(key) for name in names]
        axes[i].barh(
            range(len(names)),
            [score.mean if score else math.nan for score in scores],
            xerr=[(score.std or 0.0) if score else 0.0 for score in scores],
            color=colors,
            capsize=2,
        )
        axes[i].set_title(title, fontsize=10)
        # One column of names is enough.
        labels = names if i % n_columns == 0 else [""] * len(names)
        axes[i].set_yticks(range(len(names)), labels, fontsize=8)
        axes[i].invert_yaxis()
        axes[i].tick_params(axis="x", labelsize=8)
    for axis in axes[len(_PANELS) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _draw_cosines(path: Path, out: Path, names: Sequence[str], seed: int) -> None:
    """Per variant of the toy benchmark, how decoder rows point along the true features."""
    model = TOY.build(seed, "cpu")
    features = model.feature_dict.feature_vectors.detach()
    parents = parents_of(model)
    n_columns = min(len(names), 3)
    n_rows = math.ceil(len(names) / n_columns)
    figure = Figure(figsize=(4.2 * n_columns + 1, 4.2 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    labels = [_label(parents, i) for i in range(len(features))]
    image = None
    for axis, name in zip(axes, names, strict=False):
        sae = SAE.load_from_disk(run_folder(out, name, seed))
        cosines = cosine_similarities(sae.W_dec.detach(), features)
        matched = match(cosines).latents
        is_left = torch.ones(len(cosines), dtype=torch.bool)
        is_left[matched] = False
        rows = torch.cat([matched, is_left.nonzero().flatten()])
        image = axis.imshow(cosines[rows].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        axis.set_yticks(range(len(rows)), [str(int(row)) for row in rows], fontsize=6)
        axis.set(xlabel="true feature", ylabel="latent, matched to the features in order")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=axes.tolist(), label="cosine", shrink=0.8)
    figure.suptitle(f"Decoder rows and true features, seed {seed}")
    figure.savefig(path, dpi=130)


def _label(parents: torch.Tensor, feature: int) -> str:
    """P1 for a parent, C1.2 for its second child, 5 for a feature alone."""
    roots = [i for i in range(len(parents)) if (parents == i).any()]
    if feature in roots:
        return f"P{roots.index(feature) + 1}"
    parent = int(parents[feature])
    if parent < 0:
        return str(feature)
    siblings = (parents == parent).nonzero().flatten().tolist()
    return f"C{roots.index(parent) + 1}.{siblings.index(feature) + 1}"
