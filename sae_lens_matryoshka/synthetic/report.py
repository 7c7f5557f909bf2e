"""Scores over seeds: as a table, in files to compute with, and as plots."""

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

from sae_lens_matryoshka.synthetic.models import TOY, TOY_CHILDREN, TOY_PARENTS, Benchmark
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
_ONLY_PLOTTED = ("precision", "recall", "uniqueness", "mean_max_decoder_cosine", "l0_training")


class Spread(NamedTuple):
    """One score of one variant over n seeds; `std` is None where n is 1."""

    mean: float
    std: float | None
    n: int


def write_report(
    results: Sequence[Result], out: Path, order: Sequence[str], benchmark: Benchmark
) -> list[str]:
    """Write `table.md`, `scores.csv`, `summary.json`, `scores.png` and, for toy, the decoders.

    Args:
        results: What to report.
        out: The folder that they were read from, for the files.
        order: Variants to show first; others follow by name.
        benchmark: What they were trained on.

    Returns:
        The names of the files.
    """
    names = dict.fromkeys([*order, *(result.variant for result in results)])
    groups = {name: [result for result in results if result.variant == name] for name in names}
    by_variant = {name: group for name, group in groups.items() if group}
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
    texts = {
        "table.md": table(spreads),
        "summary.json": json.dumps(summary, indent=2, allow_nan=False),
    }
    for name, text in texts.items():
        with atomic_file(out / name) as path:
            path.write_text(text + "\n")
    with atomic_file(out / "scores.csv") as path:
        _write_csv(path, [result for group in by_variant.values() for result in group])
    plots = {"scores.png": _draw_scores(spreads)}
    if benchmark.name == TOY.name:
        seed = min(result.seed for result in results)
        folders = {name: result_folder(out, name, seed) for name in by_variant}
        folders = {name: folder for name, folder in folders.items() if folder.exists()}
        plots["decoder_cosines.png"] = _draw_cosines(folders, seed)
    for name, figure in plots.items():
        with atomic_file(out / name) as path:
            figure.savefig(path, dpi=120)
    return [*texts, "scores.csv", *plots]


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
    names = dict.fromkeys(name for result in results for name in result.scores)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "seed", *names, "seconds"])
        writer.writeheader()
        writer.writerows(
            {"variant": r.variant, "seed": r.seed, **r.scores, "seconds": r.seconds}
            for r in results
        )


def _draw_scores(spreads: dict[str, dict[str, Spread]]) -> Figure:
    """A panel per score, with a bar and its standard deviation per variant."""
    figure = Figure(figsize=(15, 3.3 + 0.75 * len(spreads)), layout="constrained")
    axes = figure.subplots(3, 5, sharey=True).flatten()
    for axis, key in zip(axes, [*_COLUMNS, *_ONLY_PLOTTED], strict=False):
        for position, (name, scores) in enumerate(spreads.items()):
            mean, std, _ = scores.get(key, (math.nan, None, 0))
            axis.barh(name, mean, xerr=std or 0.0, color=f"C{position}", capsize=2)
        axis.set_title(key, fontsize=10)
        axis.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    axes[-1].set_axis_off()
    return figure


def _draw_cosines(folders: dict[str, Path], seed: int) -> Figure:
    """Cosines of decoder rows and true features, for each variant of the toy benchmark."""
    features = TOY.build(seed, "cpu").feature_dict.feature_vectors.detach()
    labels = [str(feature) for feature in range(len(features))]
    for i, parent in enumerate(TOY_PARENTS, 1):
        children = [f"C{i}.{j}" for j in range(1, TOY_CHILDREN + 1)]
        labels[parent : parent + 1 + TOY_CHILDREN] = [f"P{i}", *children]
    n_columns = min(len(folders), 3)
    n_rows = math.ceil(len(folders) / n_columns)
    figure = Figure(figsize=(4.2 * n_columns + 1, 4.2 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axis, (name, folder) in zip(axes, folders.items(), strict=False):
        cosines = cosine_similarities(SAE.load_from_disk(folder).W_dec.detach(), features)
        matched = match(cosines)[0].tolist()
        rows = [*matched, *sorted(set(range(len(cosines))) - set(matched))]
        axis.imshow(cosines[rows].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        axis.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=6)
        axis.set(xlabel="true feature", ylabel="latent, in the order of its matched feature")
    for axis in axes[len(folders) :]:
        axis.set_axis_off()
    figure.colorbar(axes[0].images[0], ax=axes.tolist(), label="cosine", shrink=0.8)
    figure.suptitle(f"Decoder rows and true features, seed {seed}")
    return figure
