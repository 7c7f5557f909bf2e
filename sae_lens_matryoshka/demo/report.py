"""The demo's table and picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sae_lens_matryoshka.util.markdown import markdown_table

_MATRYOSHKA, _BATCHTOPK = "tab:orange", "tab:gray"
_TITLES = (
    "SAE",
    "width",
    "L0 training",
    "L0 saved",
    "variance explained",
    "CE loss recovered",
    "s",
)


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
        (
            row.sae,
            str(row.width),
            f"{row.l0_training:.2f}",
            f"{row.l0:.2f}",
            f"{row.explained_variance:.3f}",
            f"{row.ce_recovered:.3f}",
            "" if row.seconds is None else f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    return markdown_table(_TITLES, cells)


class TextReconstruction(NamedTuple):
    """How well each level reconstructs the activations on one text."""

    tokens: list[str]
    # Of each token's squared distance from b_dec.
    explained: Float[Tensor, "n_levels n_tokens"]


def draw_levels(
    path: Path,
    rows: list[Row],
    frequencies: Float[Tensor, " d_sae"],
    baseline_frequencies: Float[Tensor, " d_sae"],
    text: TextReconstruction,
) -> None:
    """Draw what each level reconstructs, overall and on one text, and how often its latents fire.

    Args:
        path: PNG file to write.
        rows: Every level of `matryoshka`, and `batchtopk`.
        frequencies: Share of tokens on which each Matryoshka latent fires.
        baseline_frequencies: The same for BatchTopK.
        text: The levels of `matryoshka` on one text.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic(
        [["variance", "loss", "frequency"], ["text", "text", "text"]], height_ratios=(3, 2)
    )
    levels = [row for row in rows if row.sae == "matryoshka"]
    (baseline,) = (row for row in rows if row.sae == "batchtopk")
    widths = [row.width for row in levels]
    for axis, field, title in (
        (panels["variance"], "explained_variance", "Variance explained"),
        (panels["loss"], "ce_recovered", "CE loss recovered"),
    ):
        values = [getattr(row, field) for row in levels]
        axis.plot(widths, values, "o-", color=_MATRYOSHKA, label="Matryoshka levels")
        for row, value in zip(levels, values, strict=True):
            axis.annotate(
                f"L0 {row.l0:.1f}",
                (row.width, value),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        value = getattr(baseline, field)
        axis.plot(baseline.width, value, "s", color=_BATCHTOPK, label="BatchTopK")
        axis.set(xscale="log", xlabel="width of the level (latents)", title=title)
        axis.set_xticks(widths, list(map(str, widths)))
        axis.minorticks_off()
        axis.margins(0.12, 0.2)
        axis.legend(loc="lower right", fontsize=8)
    _draw_frequencies(panels["frequency"], widths, frequencies, baseline_frequencies)
    _draw_text(panels["text"], widths, text)
    figure.savefig(path, dpi=130)


def _draw_frequencies(axis: Axes, widths: list[int], frequencies: Tensor, baseline: Tensor) -> None:
    """Boxes of the firing frequencies in each level and in BatchTopK, without dead latents."""
    levels = list(pairwise([0, *widths]))
    groups = [*(frequencies[start:end] for start, end in levels), baseline]
    boxes = axis.boxplot(
        [group[group > 1e-9].numpy() for group in groups],
        tick_labels=[*(f"{start}–{end}" for start, end in levels), "BatchTopK"],
        patch_artist=True,
        medianprops={"color": "black"},
        flierprops={"markersize": 2},
    )
    for box, color in zip(boxes["boxes"], [*[_MATRYOSHKA] * len(levels), _BATCHTOPK], strict=True):
        box.set(facecolor=color, alpha=0.6)
    title = "How often a latent fires (per token)"
    axis.set(yscale="log", xlabel="latents of each level", title=title)
    axis.tick_params(axis="x", rotation=30)


def _draw_text(axis: Axes, widths: list[int], text: TextReconstruction) -> None:
    image = axis.imshow(text.explained.clamp(0, 1).numpy(), aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(widths)), list(map(str, widths)))
    axis.set_xticks(range(len(text.tokens)), text.tokens, rotation=60, ha="right")
    axis.set(ylabel="width of the level", title="Share of each token's activation reconstructed")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
