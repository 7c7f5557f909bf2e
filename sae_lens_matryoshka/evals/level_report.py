"""The levels of an SAE as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sae_lens_matryoshka.evals.level_stats import LevelStats
from sae_lens_matryoshka.files import whole_file

_COLUMNS = {
    "width": ("width", "d"),
    "n_added": ("latents added", "d"),
    "l0": ("L0", ".2f"),
    "explained_variance": ("variance explained", ".3f"),
    "ce_recovered": ("CE loss recovered", ".3f"),
    "n_dead": ("dead latents", "d"),
    "max_cosine": ("mean max decoder cosine", ".3f"),
    "decoder_norm": ("decoder norm", ".3f"),
}


def level_table(rows: Sequence[LevelStats]) -> str:
    """The levels as a Markdown table, with the columns that were measured."""
    columns = {
        name: column
        for name, column in _COLUMNS.items()
        if any(getattr(row, name) is not None for row in rows)
    }
    lines = [
        "| " + " | ".join(title for title, _ in columns.values()) + " |",
        "|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [
            "" if (value := getattr(row, name)) is None else format(value, spec)
            for name, (_, spec) in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_level_stats(path: Path, rows: Sequence[LevelStats], title: str) -> None:
    """Draw L0 and variance explained against width; the file appears only when it is whole.

    Args:
        path: PNG, PDF or SVG file to write.
        rows: Levels that were measured on activations.
        title: Of the figure: which SAE it is.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    widths = [row.width for row in rows]
    for axis, name, label in (
        (axes[0], "l0", "L0"),
        (axes[1], "explained_variance", "variance explained"),
    ):
        values = [getattr(row, name) for row in rows]
        axis.plot(widths, values, "o-", color="tab:orange")
        for width, value in zip(widths, values, strict=True):
            axis.annotate(
                f"{value:.3g}",
                (width, value),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axis.set(xscale="log", xlabel="width of the level (latents)", ylabel=label)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
        axis.margins(0.12, 0.2)
    figure.suptitle(title)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
