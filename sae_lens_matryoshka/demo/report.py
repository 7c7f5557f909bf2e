"""The demo's table and picture."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

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


class TextReconstruction(NamedTuple):
    """How well each level reconstructs the activations on one text."""

    tokens: list[str]
    # Share of each token's squared distance from b_dec
    explained: Float[Tensor, "n_levels n_tokens"]


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
    image = axis.imshow(text.explained.clamp(0, 1).numpy(), aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(widths)), list(map(str, widths)))
    axis.set_xticks(range(len(text.tokens)), text.tokens, rotation=60, ha="right")
    axis.set(ylabel="width of the level", title="Share of each token's activation reconstructed")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
