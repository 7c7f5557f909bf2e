"""The demo's tables, pictures and summary."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sae_lens_matryoshka.demo.reconstruction import TextReconstruction
from sae_lens_matryoshka.levels.stats import LevelStats
from sae_lens_matryoshka.util.markdown import markdown_table

_MATRYOSHKA, _BATCHTOPK = "tab:orange", "tab:gray"
_COLUMNS = {  # of the table: title and format
    "sae": ("SAE", ""),
    "width": ("width", "d"),
    "l0_training": ("L0 training", ".2f"),
    "l0": ("L0 saved", ".2f"),
    "explained_variance": ("variance explained", ".3f"),
    "ce_recovered": ("CE loss recovered", ".3f"),
    "seconds": ("s", ".0f"),
}


class Row(NamedTuple):
    """Measurements of one level of one SAE; the widest level is the SAE itself."""

    sae: str  # the architecture it was trained as
    width: int
    l0_training: float  # mean active latents per token, over the last window of training
    l0: float  # of the saved SAE, on held-out texts, as the next two
    explained_variance: float
    # Share of the model's loss that is kept when the reconstruction replaces the activation: 0 is
    # zero ablation, 1 the unchanged model.
    ce_recovered: float
    seconds: float | None  # training time of the whole SAE, the language model's included


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    cells = [
        ["" if value is None else format(value, _COLUMNS[name][1]) for name, value in fields]
        for fields in (row._asdict().items() for row in rows)
    ]
    return markdown_table([title for title, _ in _COLUMNS.values()], cells)


def table_on_real_text(levels: list[LevelStats]) -> str:
    """L0 and variance explained of each level, as a Markdown table."""
    cells = [[str(row.width), f"{row.l0:.2f}", f"{row.explained_variance:.3f}"] for row in levels]
    return markdown_table(["width", "L0", "variance explained"], cells, n_text=0)


def table_of_tokens(widths: list[int], text: TextReconstruction, n_tokens: int) -> str:
    """Variance explained of the first tokens that training did not leave out, as a table."""
    shown = (~text.explained[0].isnan()).nonzero().flatten()[:n_tokens].tolist()
    cells = [
        [str(width), *(f"{value:.2f}" for value in row[shown].tolist())]
        for width, row in zip(widths, text.explained, strict=True)
    ]
    titles = [text.tokens[token].strip() for token in shown]
    return markdown_table(["width", *titles], cells, n_text=0)


def summary(rows: list[Row], levels: list[LevelStats] | None) -> str:
    """What was trained and what it shows, in a few sentences.

    Args:
        rows: Every level of `matryoshka`, and `batchtopk`.
        levels: The levels of the SAE that comes with the package, if they were measured.
    """
    first, *_, last = (row for row in rows if row.sae == "matryoshka")
    (baseline,) = (row for row in rows if row.sae == "batchtopk")
    lines = [
        f"Trained: two SAEs of {last.width:,} latents on a language model of three layers, with "
        "levels (matryoshka) and without (batchtopk).",
        f"The first {first.width} latents of matryoshka explain {first.explained_variance:.1%} of "
        f"the variance, all of them {last.explained_variance:.1%}; batchtopk explains "
        f"{baseline.explained_variance:.1%}.",
        "This shows that training, levels and SAEBench work. The model is too small to show what "
        "nesting does to features.",
    ]
    if levels is not None:
        first, last = levels[0], levels[-1]
        lines.append(
            f"The SAE of SmolLM2-135M-Instruct that comes with the package has {last.width:,} "
            f"latents: on English texts its first {first.width} explain "
            f"{first.explained_variance:.1%} of the variance, all of them "
            f"{last.explained_variance:.1%}."
        )
    return "\n".join(lines)


def draw_levels(
    path: Path,
    rows: list[Row],
    frequencies: dict[str, Float[Tensor, " d_sae"]],
    text: TextReconstruction,
) -> None:
    """Draw what each level reconstructs, overall and on one text, and how often its latents fire.

    Args:
        path: PNG file to write.
        rows: Every level of `matryoshka`, and `batchtopk`.
        frequencies: Share of tokens on which each latent of these SAEs fires.
        text: The levels of `matryoshka` on one text.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic(
        [["variance", "loss", "frequency"], ["text", "text", "text"]], height_ratios=(3, 2)
    )
    levels = [row for row in rows if row.sae == "matryoshka"]
    (baseline,) = (row for row in rows if row.sae == "batchtopk")
    widths = [row.width for row in levels]
    for panel, field, title in (
        ("variance", "explained_variance", "Variance explained"),
        ("loss", "ce_recovered", "CE loss recovered"),
    ):
        axis = panels[panel]
        values = [getattr(row, field) for row in levels]
        axis.plot(widths, values, "o-", color=_MATRYOSHKA, label="Matryoshka levels")
        for row, value in zip(levels, values, strict=True):
            label = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
            axis.annotate(f"L0 {row.l0:.1f}", (row.width, value), fontsize=8, **label)
        value = getattr(baseline, field)
        axis.plot(baseline.width, value, "s", color=_BATCHTOPK, label="BatchTopK")
        axis.set(xscale="log", xlabel="width of the level (latents)", title=title)
        axis.set_xticks(widths, list(map(str, widths)))
        axis.minorticks_off()
        axis.margins(0.12, 0.2)
        axis.legend(loc="lower right", fontsize=8)
    _draw_frequencies(panels["frequency"], widths, frequencies)
    _draw_text(panels["text"], widths, text)
    panels["text"].set_title("Share of each token's activation reconstructed")
    figure.savefig(path, dpi=130)


def draw_sentences(path: Path, widths: list[int], texts: Sequence[TextReconstruction]) -> None:
    """Draw what each level reconstructs of each token, and which latent it adds.

    Args:
        path: PNG file to write.
        widths: Of the levels.
        texts: One panel each.
    """
    figure = Figure(figsize=(13, 0.5 + 2.2 * len(texts)), layout="constrained")
    figure.suptitle(
        "Share of each token's activation reconstructed (grey: left out of training); number: the "
        "strongest of the latents that the level adds"
    )
    axes = figure.subplots(len(texts), squeeze=False)[:, 0]
    for axis, text in zip(axes, texts, strict=True):
        _draw_text(axis, widths, text)
        for level, token in (text.strongest >= 0).nonzero().tolist():
            is_dark = text.explained[level, token] < 0.6
            axis.text(
                token,
                level,
                str(text.strongest[level, token].item()),
                color="white" if is_dark else "black",
                fontsize=7,
                ha="center",
                va="center",
            )
    figure.savefig(path, dpi=130)


def _draw_frequencies(axis: Axes, widths: list[int], frequencies: dict[str, Tensor]) -> None:
    """Boxes of the firing frequencies in each level and in BatchTopK, without dead latents."""
    groups = {
        f"{start}–{end}": frequencies["matryoshka"][start:end]
        for start, end in pairwise([0, *widths])
    }
    groups["BatchTopK"] = frequencies["batchtopk"]
    boxes = axis.boxplot(
        [group[group > 1e-9].numpy() for group in groups.values()],
        tick_labels=list(groups),
        patch_artist=True,
        medianprops={"color": "black"},
        flierprops={"markersize": 2},
    )
    for box, name in zip(boxes["boxes"], groups, strict=True):
        box.set(facecolor=_BATCHTOPK if name == "BatchTopK" else _MATRYOSHKA, alpha=0.6)
    title = "How often a latent fires (per token)"
    axis.set(yscale="log", xlabel="latents of each level", title=title)
    axis.tick_params(axis="x", rotation=30)


def _draw_text(axis: Axes, widths: list[int], text: TextReconstruction) -> None:
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="lightgray")
    image = axis.imshow(text.explained.clamp(0, 1), aspect="auto", cmap=colors, vmin=0, vmax=1)
    axis.set_yticks(range(len(widths)), list(map(str, widths)))
    axis.set_xticks(range(len(text.tokens)), text.tokens, rotation=60, ha="right")
    axis.set_ylabel("width of the level")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
