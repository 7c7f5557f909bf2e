"""The tables and pictures of docs/results/smollm2.md, from the files that `run.py` writes.

    python -m examples.smollm2.report

A table stands in the page between `<!-- table NAME -->` and `<!-- end -->`, where it is replaced.
± is half of Student's 95 % interval of the mean over the seeds of training.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from examples.smollm2.arms import BATCH_SIZE, Arm, all_arms, tuning_arms
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "results" / "smollm2.md"
MAIN = ("batchtopk", "matryoshka", "recommended")
VARIANTS = (*MAIN, "frequency", "ordered", "drawn", "faded")
# What a row of a table shows: header → where a level's value is, and its digits
_ABSORPTION = "absorption.mean."
COLUMNS = {
    "L0": ("l0", 1),
    "variance expl.": ("explained_variance", 3),
    "dead": ("n_dead", 0),
    "absorption, full": (f"{_ABSORPTION}mean_full_absorption_score", 3),
    "absorption, fraction": (f"{_ABSORPTION}mean_absorption_fraction_score", 3),
    "latents per letter": (f"{_ABSORPTION}mean_num_split_features", 2),
    "meta-SAE variance": ("meta_structure.meta_structure.decoder_fraction_variance_explained", 3),
    "CE loss score": ("core.model_performance_preservation.ce_loss_score", 3),
    "max cosine": ("max_cosine", 3),
}
Value = tuple[float, float | None]  # a mean, and half of its interval; None from one seed


class Results:
    """What is known of the SAEs.

    Args:
        folder: Of the JSON files.
    """

    def __init__(self, folder: Path):
        self._of = {}
        for arm in [*all_arms(), *tuning_arms()]:
            file = folder / f"{arm.name}.json"
            if file.exists():
                self._of[arm] = json.loads(file.read_text())

    def seeds(self, arm: Arm) -> list[Arm]:
        """The SAEs that differ from `arm` in the seed alone, as far as they are trained."""
        return [other for other in self._of if other._replace(seed=arm.seed) == arm]

    def value(self, arm: Arm, column: str, width: int | None = None) -> Value | None:
        """A mean over seeds; None if no SAE has the value.

        Args:
            arm: One of the SAEs.
            column: A key of `COLUMNS`.
            width: Of the level; by default the whole SAE.
        """
        path, _ = COLUMNS[column]
        found = [self._read(seed, path, width or arm.d_sae) for seed in self.seeds(arm)]
        values = [value for value in found if value is not None]
        if not values:
            return None
        if len(values) == 1:
            return values[0], None
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        return statistics.fmean(values), float(half)

    def _read(self, arm: Arm, path: str, width: int) -> float | None:
        result = self._of[arm]
        evaluation, _, rest = path.partition(".")
        if not rest:
            (level,) = (level for level in result["levels"] if level["width"] == width)
            return level[path]
        value: Any = result["saebench"].get(evaluation, {}).get("widths", {}).get(str(width))
        for key in rest.split("."):
            value = None if value is None else value[key]
        return value


def cell(value: Value | None, digits: int) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def table(
    results: Results, first: str, rows: Mapping[str, tuple[Arm, int]], columns: Sequence[str]
) -> str:
    """A row for each SAE or level that is trained: its label → a seed of it, and the width."""
    lines = []
    for label, (arm, width) in rows.items():
        if seeds := results.seeds(arm):
            cells = [cell(results.value(arm, c, width), COLUMNS[c][1]) for c in columns]
            lines.append([label, *cells, str(len(seeds))])
    return markdown_table([first, *columns, "seeds"], lines)


def tables(results: Results) -> dict[str, str]:
    """Every table of the page."""
    absorption = ("absorption, full", "absorption, fraction", "latents per letter")
    scores = ("L0", "variance expl.", *absorption)

    def whole(arms: Iterable[tuple[str, Arm]]) -> dict[str, tuple[Arm, int]]:
        return {label: (arm, arm.d_sae) for label, arm in arms}

    levels = {
        f"{recipe}, {width}": (Arm(recipe, 24, 0), width)
        for recipe in MAIN[1:]
        for width in Arm(recipe, 24, 0).options()["matryoshka_widths"]
    }
    return {
        "main": table(
            results,
            "SAE",
            whole((f"{r}, k {k}", Arm(r, k, 0)) for k in (12, 24, 48) for r in MAIN),
            (*scores, "dead", "CE loss score", "meta-SAE variance", "max cosine"),
        ),
        "levels": table(results, "level", levels, (*scores, "dead")),
        "variants": table(
            results, "SAE", whole((r, Arm(r, 24, 0)) for r in VARIANTS), (*scores, "dead")
        ),
        "width": table(
            results,
            "SAE",
            whole(
                (f"{r}, {d_sae:,} latents", Arm(r, 24, 0, d_sae=d_sae))
                for d_sae in (4096, 16384)
                for r in MAIN[:2]
            ),
            (*scores, "meta-SAE variance"),
        ),
        "tokens": table(
            results,
            "SAE",
            whole(
                (f"{r}, {n * BATCH_SIZE / 1e6:.1f}M tokens", Arm(r, 24, 0, n_steps=n))
                for r in MAIN[:2]
                for n in (1100, 2200, 4400, 8800)
            ),
            (*scores, "dead"),
        ),
        "layer": table(
            results,
            "SAE",
            whole((f"{r}, layer {n}", Arm(r, 24, 0, layer=n)) for n in (7, 14) for r in MAIN[:2]),
            scores,
        ),
        "tuning": table(
            results,
            "SAE",
            whole((f"{arm.recipe}, lr {arm.lr:g}", arm) for arm in tuning_arms()),
            ("L0", "variance expl.", "dead"),
        ),
    }


def draw(results: Results, path: Path) -> None:
    """Absorption, latents per letter and variance explained against L0, with intervals."""
    shown = ("absorption, full", "absorption, fraction", "latents per letter", "variance expl.")
    figure = Figure(figsize=(4 * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for axis, column in zip(axes, shown, strict=True):
        for recipe, style in zip(MAIN, ("s--", "o-", "^-"), strict=True):
            points = [
                (l0[0], value)
                for k in (12, 24, 48)
                if (value := results.value(Arm(recipe, k, 0), column))
                and (l0 := results.value(Arm(recipe, k, 0), "L0"))
            ]
            if points:
                axis.errorbar(
                    [l0 for l0, _ in points],
                    [mean for _, (mean, _) in points],
                    yerr=[half or 0 for _, (_, half) in points],
                    fmt=style,
                    capsize=3,
                    label=recipe,
                )
        axis.set(xscale="log", xlabel="L0", ylabel=column)
        axis.set_xticks([12, 24, 48], ["12", "24", "48"])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Replace the tables of the page, and draw its picture.

    Returns:
        The exit code: 0; 2 if the page lacks the place of a table.
    """
    parser = argparse.ArgumentParser(description="Tables and pictures of docs/results/smollm2.md.")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    results = Results(args.page.with_suffix(""))
    text = args.page.read_text()
    for name, content in tables(results).items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            print(f"error: {args.page} has no place for the table {name}.", file=sys.stderr)
            return 2
        text = place.sub(lambda found, c=content: f"{found[1]}\n{c}\n\n{found[2]}", text)
    with atomic_file(args.page) as unfinished:
        unfinished.write_text(text)
    draw(results, args.page.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
