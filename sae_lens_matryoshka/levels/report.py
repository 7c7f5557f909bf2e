"""The levels of an SAE as a table and as a plot."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sae_lens_matryoshka.levels.stats import LevelStats
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

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
    columns = _measured(_COLUMNS, rows)
    cells = [[_cell(getattr(row, name), spec) for name, (_, spec) in columns] for row in rows]
    return markdown_table([title for _, (title, _) in columns], cells, n_text=0)


def level_note(rows: Sequence[LevelStats], data: str) -> str:
    """What the levels were measured on, for below the table; `data` is its name."""
    last = rows[-1]
    if last.n_tokens is None:
        return "From the weights alone; L0 and variance explained were not measured."
    error = "" if last.l0_error is None else f", ± {last.l0_error:.2g} for the whole SAE"
    return (
        f"Measured on {last.n_tokens:,} tokens of {data}. L0 is the mean number of active latents "
        f"per token of the saved SAE{error} (standard error); a latent is dead if none of these "
        "tokens activates it."
    )


def draw_level_stats(path: Path, rows: Sequence[LevelStats], title: str) -> None:
    """Plot what was measured on activations against the levels' widths, to a PNG, PDF or SVG."""
    curves = _measured(("l0", "explained_variance", "ce_recovered"), rows[-1:])
    figure = Figure(figsize=(4.5 * len(curves), 3.6), layout="constrained")
    widths = [row.width for row in rows]
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (name, (label, spec)) in zip(axes, curves, strict=True):
        values = [getattr(row, name) for row in rows]
        axis.plot(widths, values, "o-", color="tab:orange")
        for point in zip(widths, values, strict=True):
            text = format(point[1], spec)
            offset = {"xytext": (0, -14), "textcoords": "offset points"}
            axis.annotate(text, point, **offset, ha="center", fontsize=8)
        axis.set(xscale="log", xlabel="width of the level (latents)", ylabel=label)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
        axis.margins(0.12, 0.2)
    figure.suptitle(title)
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)


def _measured(
    names: Iterable[str], rows: Sequence[LevelStats]
) -> list[tuple[str, tuple[str, str]]]:
    """Name, title and format of the measures that any level has."""
    return [
        (name, _COLUMNS[name])
        for name in names
        if any(getattr(row, name) is not None for row in rows)
    ]


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
