"""The demo's table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_MATRYOSHKA, _BATCHTOPK = "tab:orange", "tab:gray"


class Row(NamedTuple):
    """What was measured of one level of one SAE; the widest level is the SAE itself.

    Attributes:
        sae: The architecture it was trained as.
        width: Latents of the level.
        l0_training: Mean active latents per token, over the last window of training.
        l0: The same for the saved SAE, on held-out texts.
        explained_variance: Of the held-out activations, 1 is all.
        ce_recovered: Share of the model's loss kept with the reconstruction in place of the
            activation: 0 is zero ablation, 1 the model as it is.
        seconds: Training time of the whole SAE, the language model's included.
    """

    sae: str
    width: int
    l0_training: float
    l0: float
    explained_variance: float
    ce_recovered: float
    seconds: float | None


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| SAE | width | L0 training | L0 saved | variance explained | CE loss recovered | s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append(
            f"| {row.sae} | {row.width} | {row.l0_training:.2f} | {row.l0:.2f} "
            f"| {row.explained_variance:.3f} | {row.ce_recovered:.3f} | {seconds} |"
        )
    return "\n".join(lines)


class Reading(NamedTuple):
    """How far each level gets on each token of one text.

    Attributes:
        tokens: The T tokens.
        shares: (P, T) share of the token's squared distance from b_dec that the level reconstructs.
    """

    tokens: list[str]
    shares: torch.Tensor


def draw_levels(
    path: Path,
    rows: list[Row],
    frequencies: torch.Tensor,
    baseline_frequencies: torch.Tensor,
    reading: Reading,
) -> None:
    """Draw what each level reconstructs, in all and on one text, and how often its latents fire.

    Args:
        path: PNG file to write.
        rows: Levels of `matryoshka`, and `batchtopk` whole.
        frequencies: (d_sae,) share of tokens on which each Matryoshka latent fires.
        baseline_frequencies: The same of BatchTopK.
        reading: The levels of `matryoshka` on one text.
    """
    figure, panels = plt.subplot_mosaic(
        [["variance", "loss", "frequency"], ["text", "text", "text"]],
        figsize=(13, 7),
        height_ratios=(3, 2),
        layout="constrained",
    )
    levels = [row for row in rows if row.sae == "matryoshka"]
    (baseline,) = (row for row in rows if row.sae == "batchtopk")
    for axis, field, title in (
        (panels["variance"], "explained_variance", "Variance explained"),
        (panels["loss"], "ce_recovered", "CE loss recovered"),
    ):
        values = [getattr(row, field) for row in levels]
        axis.plot(
            [row.width for row in levels],
            values,
            "o-",
            color=_MATRYOSHKA,
            label="Matryoshka levels",
        )
        for row, value in zip(levels, values, strict=True):
            axis.annotate(
                f"L0 {row.l0:.1f}",
                (row.width, value),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axis.plot(
            baseline.width,
            getattr(baseline, field),
            "s",
            color=_BATCHTOPK,
            label="BatchTopK, whole",
        )
        axis.set(xscale="log", xlabel="width of the level (latents)", title=title)
        axis.set_xticks([row.width for row in levels], [str(row.width) for row in levels])
        axis.minorticks_off()
        axis.margins(0.12, 0.2)
        axis.legend(loc="lower right", fontsize=8)
    widths = [row.width for row in levels]
    _draw_frequencies(panels["frequency"], widths, frequencies, baseline_frequencies)
    _draw_reading(panels["text"], widths, reading)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_frequencies(
    axis: Axes, widths: list[int], frequencies: torch.Tensor, baseline: torch.Tensor
) -> None:
    """One box of firing frequencies per level, and one of BatchTopK; dead latents left out."""
    groups = [frequencies[start:end] for start, end in zip([0, *widths], widths, strict=False)]
    names = [f"{start}–{end}" for start, end in zip([0, *widths], widths, strict=False)]
    boxes = axis.boxplot(
        [group[group > 1e-9].numpy() for group in [*groups, baseline]],
        tick_labels=[*names, "BatchTopK"],
        patch_artist=True,
        medianprops={"color": "black"},
        flierprops={"markersize": 2},
    )
    for box, color in zip(boxes["boxes"], [*[_MATRYOSHKA] * len(groups), _BATCHTOPK], strict=True):
        box.set(facecolor=color, alpha=0.6)
    axis.set(
        yscale="log", xlabel="latents of each level", title="How often a latent fires (per token)"
    )
    axis.tick_params(axis="x", rotation=30)


def _draw_reading(axis: Axes, widths: list[int], reading: Reading) -> None:
    image = axis.imshow(reading.shares.clamp(0, 1).numpy(), aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(widths)), [str(width) for width in widths])
    axis.set_xticks(range(len(reading.tokens)), reading.tokens, rotation=60, ha="right")
    axis.set(ylabel="width of the level", title="Share of each token's activation reconstructed")
    axis.figure.colorbar(image, ax=axis, pad=0.01)
