"""Scores over seeds: as a table, in files to compute with, and as plots."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from sae_lens import SAE
from sae_lens.util import cosine_similarities

from sae_lens_matryoshka.synthetic.models import TOY, Benchmark, parents_of
from sae_lens_matryoshka.synthetic.results import Result, result_folder
from sae_lens_matryoshka.synthetic.scores import match
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

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


class Spread(NamedTuple):
    """One score of one variant over n seeds; `std` is None where n is 1."""

    mean: float
    std: float | None
    n: int


class Report(NamedTuple):
    """The table as Markdown, and the names of the files in the output folder."""

    table: str
    files: list[str]


def write_report(
    results: Sequence[Result], out: Path, order: Sequence[str], benchmark: Benchmark
) -> Report:
    """Write `scores.csv`, `summary.json`, `table.md`, `scores.png` and, for toy, the decoders.

    Args:
        results: What to report.
        out: The folder that they were read from, for the files.
        order: Variants to show first; others follow by name.
        benchmark: What they were trained on.
    """
    by_variant: dict[str, list[Result]] = {name: [] for name in order}
    for result in results:
        by_variant.setdefault(result.variant, []).append(result)
    by_variant = {name: group for name, group in by_variant.items() if group}
    spreads = {name: summarize(group) for name, group in by_variant.items()}
    summary = {
        "benchmark": benchmark.name,
        "variants": {
            name: {
                "seeds": [result.seed for result in group],
                "settings": {k: v for k, v in group[0].settings.items() if k != "seed"},
                "seconds": statistics.fmean(result.seconds for result in group),
                "scores": {key: s._asdict() for key, s in spreads[name].items()},
            }
            for name, group in by_variant.items()
        },
    }
    text = table(spreads)
    with atomic_file(out / "table.md") as path:
        path.write_text(text + "\n")
    with atomic_file(out / "scores.csv") as path:
        _write_csv(path, [result for group in by_variant.values() for result in group])
    with atomic_file(out / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    with atomic_file(out / "scores.png") as path:
        _draw_scores(path, spreads)
    files = ["table.md", "scores.csv", "summary.json", "scores.png"]
    if benchmark.name == TOY.name:
        seed = min(result.seed for result in results)
        folders = {name: result_folder(out, name, seed) for name in by_variant}
        with atomic_file(out / "decoder_cosines.png") as path:
            _draw_cosines(path, {name: f for name, f in folders.items() if f.exists()}, seed)
        files.append("decoder_cosines.png")
    return Report(text, files)


def summarize(results: Sequence[Result]) -> dict[str, Spread]:
    """Every score of one variant, over the results that have it."""
    spreads = {}
    for name in dict.fromkeys(name for result in results for name in result.scores):
        values = [result.scores[name] for result in results if name in result.scores]
        std = statistics.stdev(values) if len(values) > 1 else None
        spreads[name] = Spread(statistics.fmean(values), std, len(values))
    return spreads


def table(spreads: dict[str, dict[str, Spread]]) -> str:
    """Means and standard deviations as a Markdown table, a row per variant."""
    rows = []
    for name, scores in spreads.items():
        n_seeds = max(spread.n for spread in scores.values())
        cells = [_cell(scores.get(key), d, n_seeds) for key, (_, d) in _COLUMNS.items()]
        rows.append([name, *cells, str(n_seeds)])
    titles = ["variant", *(title for title, _ in _COLUMNS.values()), "n"]
    return markdown_table(titles, rows) + "\n\n± is the standard deviation over n seeds."


def _cell(spread: Spread | None, digits: int, n_seeds: int) -> str:
    if spread is None:
        return ""
    std = "" if spread.std is None else f" ± {spread.std:.{digits}f}"
    few = "" if spread.n == n_seeds else f" ({spread.n} of {n_seeds})"
    return f"{spread.mean:.{digits}f}{std}{few}"


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *names, "seconds"])
        for result in results:
            scores = [result.scores.get(name, "") for name in names]
            writer.writerow([result.variant, result.seed, *scores, result.seconds])


def _draw_scores(path: Path, spreads: dict[str, dict[str, Spread]]) -> None:
    """A panel per score, with a bar and its standard deviation per variant."""
    n_columns = 5
    n_rows = math.ceil(len(_PANELS) / n_columns)
    height = 1.1 + 0.25 * len(spreads)
    figure = Figure(figsize=(15, n_rows * height), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    positions = range(len(spreads))
    for i, (key, title) in enumerate(_PANELS.items()):
        scores = [spread.get(key) for spread in spreads.values()]
        axes[i].barh(
            positions,
            [score.mean if score else math.nan for score in scores],
            xerr=[(score.std or 0.0) if score else 0.0 for score in scores],
            color=[f"C{position}" for position in positions],
            capsize=2,
        )
        axes[i].set_title(title, fontsize=10)
        labels = list(spreads) if i % n_columns == 0 else []  # in the first column
        axes[i].set_yticks(positions if labels else [], labels, fontsize=8)
        axes[i].invert_yaxis()
        axes[i].tick_params(axis="x", labelsize=8)
    for axis in axes[len(_PANELS) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _draw_cosines(path: Path, folders: dict[str, Path], seed: int) -> None:
    """Cosines of decoder rows and true features, for each variant of the toy benchmark."""
    model = TOY.build(seed, "cpu")
    features = model.feature_dict.feature_vectors.detach()
    labels = _feature_labels(parents_of(model).tolist())
    n_columns = min(len(folders), 3)
    n_rows = math.ceil(len(folders) / n_columns)
    figure = Figure(figsize=(4.2 * n_columns + 1, 4.2 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    image = None
    for axis, (name, folder) in zip(axes, folders.items(), strict=False):
        cosines = cosine_similarities(SAE.load_from_disk(folder).W_dec.detach(), features)
        matched = match(cosines).latents.tolist()
        rows = [*matched, *sorted(set(range(len(cosines))) - set(matched))]
        image = axis.imshow(cosines[rows].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        axis.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=6)
        axis.set(xlabel="true feature", ylabel="latent, matched to the features in order")
    for axis in axes[len(folders) :]:
        axis.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=axes.tolist(), label="cosine", shrink=0.8)
    figure.suptitle(f"Decoder rows and true features, seed {seed}")
    figure.savefig(path, dpi=130)


def _feature_labels(parents: list[int]) -> list[str]:
    """P1 for a parent, C1.2 for its second child, 5 for a feature outside the tree."""
    roots = sorted(set(parents) - {-1})
    labels = []
    for feature, parent in enumerate(parents):
        if feature in roots:
            labels.append(f"P{roots.index(feature) + 1}")
        elif parent < 0:
            labels.append(str(feature))
        else:  # the toy's children come right after their parent
            labels.append(f"C{roots.index(parent) + 1}.{feature - parent}")
    return labels
