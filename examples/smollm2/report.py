"""Tables and a picture of the files that `run.py` writes.

    python -m examples.smollm2.report --results smollm2/results   # writes report.md and .png there
    python -m examples.smollm2.report                             # of docs/results/smollm2.md

A table stands in that page between `<!-- table NAME -->` and `<!-- end -->`, where it is replaced.
"""

import argparse
import itertools
import json
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from examples.smollm2.arms import BATCH_SIZE, LR, Arm, all_arms, tuning_arms
from examples.smollm2.intervals import Value, difference, interpolated, mean, paired_difference
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "results" / "smollm2.md"
MAIN = ("batchtopk", "matryoshka", "recommended")
PARTS = ("frequency", "ordered")  # one and two of the three changes of `recommended`
VARIANTS = (*MAIN, *PARTS, "drawn", "faded")
KS = (6, 12, 24, 48)
# What a row of a table shows: header → where a level's value is, and its digits
_ABSORPTION = "absorption.mean."
_PROBES = "sparse_probing_sae_probes.sae.sae_top_"
COLUMNS = {
    "L0": ("l0", 1),
    "variance expl.": ("explained_variance", 3),
    "dead": ("n_dead", 0),
    "absorption, full": (f"{_ABSORPTION}mean_full_absorption_score", 3),
    "full, by words": (f"{_ABSORPTION}by_words", 3),
    "full, letters found": (f"{_ABSORPTION}of_found_letters", 3),
    "absorption, fraction": (f"{_ABSORPTION}mean_absorption_fraction_score", 3),
    "latents per letter": (f"{_ABSORPTION}mean_num_split_features", 2),
    "precision": (f"{_ABSORPTION}precision", 2),
    "probing, top 1": (f"{_PROBES}1_test_auc", 3),
    "probing, top 5": (f"{_PROBES}5_test_auc", 3),
    "meta-SAE variance": ("meta_structure.meta_structure.decoder_fraction_variance_explained", 3),
    "CE loss added": ("core.ce_loss_added", 3),
    "firings of dense": ("core.misc_metrics.normalized_freq_over_10_percent", 2),
    "max cosine": ("max_cosine", 3),
    # of the tree whose parents are any more frequent latents, as in an SAE without levels
    "pairs tested": ("tree.frequency.n_tested", 0),
    "edges": ("tree.frequency.n_passed", 0),
    "edges by level": ("tree.level.n_passed", 0),
    "latents with a parent": ("tree.frequency.n_children", 0),
    "parents": ("tree.frequency.n_parents", 0),
    "families": ("tree.frequency.n_families", 0),
    "coverage ≥ 0.9": ("tree.frequency.n_covered", 0),
    "shifted: tested": ("tree.frequency.n_shifted_tested", 0),
    "passed": ("tree.frequency.n_shifted_passed", 0),
}
ABSORPTION = (
    *("absorption, full", "full, by words", "full, letters found"),
    *("absorption, fraction", "latents per letter", "precision"),
)
DIFFERENCES = (
    *("variance expl.", "absorption, full", "full, letters found", "absorption, fraction"),
    *("latents per letter", "probing, top 1", "meta-SAE variance", "max cosine", "edges"),
    "CE loss added",
)
TREES = (
    *("pairs tested", "edges", "edges by level", "latents with a parent", "parents", "families"),
    *("coverage ≥ 0.9", "shifted: tested", "passed"),
)
_FOUND = 0.1  # of a letter's words have to activate the latent that SAEBench took for it
SCORES = ("L0", "variance expl.", *ABSORPTION)


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

    def value(self, arm: Arm, column: str, width: int | None = None) -> float | None:
        """A value of one SAE; None if it is not known.

        Args:
            arm: The SAE.
            column: A key of `COLUMNS`.
            width: Of the level; by default the whole SAE.
        """
        width = width or arm.d_sae
        result = self._of.get(arm, {})
        path, _ = COLUMNS[column]
        evaluation, _, rest = path.partition(".")
        if not rest:
            of_width = [level for level in result.get("levels", []) if level["width"] == width]
            return of_width[0][path] if of_width else None
        if evaluation == "tree":
            rule, _, number = rest.partition(".")
            return result.get("tree", {}).get(rule, {}).get(number)
        known: Any = self._scores(arm, evaluation, width)
        if not known:
            return None
        if rest == "ce_loss_added":
            losses = known["model_performance_preservation"]
            return losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"]
        if rest == "mean.by_words":
            letters = known["letters"].values()
            n_words = sum(letter["num_probe_true_positives"] for letter in letters)
            return sum(letter["num_full_absorption"] for letter in letters) / n_words
        if rest in ("mean.of_found_letters", "mean.precision"):
            letters = known["letters"].values()
            if any("recall" not in letter for letter in letters):
                return None
            if rest == "mean.precision":
                return median(letter["precision"] for letter in letters)
            return fmean(
                letter["num_full_absorption"] / letter["num_probe_true_positives"]
                for letter in letters
                if letter["recall"] >= _FOUND
            )
        for key in rest.split("."):
            known = known[key]
        return known

    def letters(self, arm: Arm) -> list[dict[str, Any]]:
        """What absorption found for each letter, of the SAEs that differ from `arm` in the seed."""
        found = []
        for other in self._seeds(arm):
            letters = self._scores(other, "absorption", arm.d_sae).get("letters", {})
            found += [letter for letter in letters.values() if "latent" in letter]
        return found

    def by_seed(self, arm: Arm, column: str, width: int | None = None) -> dict[int, float]:
        """The values of the SAEs that differ from `arm` in the seed alone: seed → value."""
        values = {other.seed: self.value(other, column, width) for other in self._seeds(arm)}
        return {seed: value for seed, value in values.items() if value is not None}

    def at_variance(self, arm: Arm, column: str, explained: float) -> float | None:
        """A value of an SAE of another k that explains as much, between those that are trained."""
        arms = [arm._replace(k=k) for k in KS]
        points = [(self.value(a, "variance expl."), self.value(a, column)) for a in arms]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        if column != "L0":
            return interpolated(known, explained)
        # what is explained grows with the logarithm of L0
        log_l0 = interpolated([(x, log(y)) for x, y in known], explained)
        return None if log_l0 is None else exp(log_l0)

    def _seeds(self, arm: Arm) -> list[Arm]:
        """The SAEs that differ from `arm` in the seed alone, and itself, as far as known."""
        return [other for other in self._of if other._replace(seed=arm.seed) == arm]

    def _scores(self, arm: Arm, evaluation: str, width: int) -> dict[str, Any]:
        """SAEBench's scores of a level; empty if it was not evaluated."""
        evaluated = self._of.get(arm, {}).get("saebench", {}).get(evaluation, {})
        return evaluated.get("widths", {}).get(str(width), {})


def cell(value: Value | None, digits: int, n: int = 0, sign: str = "") -> str:
    """A value as tables show it.

    Args:
        value: A mean, and half of its interval.
        digits: After the point.
        n: The seeds of its row; where the value has fewer, it says how many.
        sign: "+" to show the sign of positive values too.
    """
    if value is None:
        return ""
    half = "" if value.half is None else f" ± {value.half:.{digits}f}"
    return f"{value.mean:{sign}.{digits}f}{half}" + (f" (n {value.n})" if value.n < n else "")


def table(
    results: Results,
    first: str,
    rows: Mapping[str, tuple[Arm, int]],
    columns: Sequence[str],
    seed: int | None = None,
) -> str:
    """A row for each SAE or level that is trained: its label → a seed of it, and the width.

    With `seed`, of that seed alone.
    """
    lines = []
    for label, (arm, width) in rows.items():
        of_columns = [results.by_seed(arm, column, width) for column in columns]
        values = [mean(v for s, v in of.items() if seed in (None, s)) for of in of_columns]
        n = max((value.n for value in values if value), default=0)
        if n:
            digits = [COLUMNS[column][1] for column in columns]
            cells = [cell(*each, n) for each in zip(values, digits, strict=True)]
            lines.append([label, *cells, str(n)])
    return markdown_table([first, *columns, "seeds"], lines)


def signed_table(
    first: str, columns: Sequence[str], rows: Mapping[str, Callable[[str], Value | None]]
) -> str:
    """A row for each label that has a value: label → column → difference."""
    lines = []
    for label, difference_of in rows.items():
        cells = [cell(difference_of(each), COLUMNS[each][1], sign="+") for each in columns]
        if any(cells):
            lines.append([label, *cells])
    return markdown_table([first, *columns], lines)


def differences(results: Results, arms: Mapping[str, Arm], columns: Sequence[str]) -> str:
    """What nesting changes at the same k: a row for each nested SAE, its label → a seed of it."""

    def against_batchtopk(arm: Arm, column: str) -> Value | None:
        plain = results.by_seed(arm._replace(recipe=MAIN[0]), column)
        return difference(results.by_seed(arm, column).values(), plain.values())

    rows = {label: partial(against_batchtopk, arm) for label, arm in arms.items()}
    return signed_table("against batchtopk", columns, rows)


def paired(results: Results, arms: Iterable[Arm], columns: Sequence[str]) -> str:
    """What a recipe changes against plain nesting with the same seed: a row for each SAE."""

    def against_matryoshka(arm: Arm, column: str) -> Value | None:
        plain = results.by_seed(arm._replace(recipe=MAIN[1]), column)
        return paired_difference(results.by_seed(arm, column), plain)

    rows = {f"{arm.recipe}, k {arm.k}": partial(against_matryoshka, arm) for arm in arms}
    return signed_table("against matryoshka", columns, rows)


def by_activations(results: Results, earlier: Results, columns: Sequence[str]) -> str:
    """What changed with the activations that the same SAEs were trained on."""

    def against_earlier(arm: Arm, column: str) -> Value | None:
        before = earlier.by_seed(arm, column)
        return difference(results.by_seed(arm, column).values(), before.values())

    arms = [Arm(recipe, k, 0) for k in KS for recipe in MAIN]
    rows = {f"{arm.recipe}, k {arm.k}": partial(against_earlier, arm) for arm in arms}
    return signed_table("against bfloat16", columns, rows)


def at_equal_variance(results: Results, columns: Sequence[str]) -> str:
    """What nesting changes where BatchTopK explains as much: a row for each k and recipe."""
    lines = []
    for k in KS:
        for recipe in MAIN[1:]:
            explained = results.by_seed(Arm(recipe, k, 0), "variance expl.")
            cells = []
            for column in columns:
                nested = results.by_seed(Arm(recipe, k, 0), column)
                plain = {
                    seed: results.at_variance(Arm(MAIN[0], k, seed), column, explained[seed])
                    for seed in nested
                }
                value = paired_difference(nested, plain)
                cells.append(cell(value, COLUMNS[column][1], len(explained), sign="+"))
            if any(cells):
                label = f"{recipe}, k {k}"
                lines.append([label, cell(mean(explained.values()), 3), *cells])
    return markdown_table(["against batchtopk", "variance expl.", *columns], lines)


def letters_by_level(results: Results, recipes: Sequence[str]) -> str:
    """In which level the letters' latents are, and how many of their words are absorbed."""
    lines = []
    for k, recipe in itertools.product(KS, recipes):
        letters = results.letters(arm := Arm(recipe, k, 0))
        if not letters:
            continue
        widths = arm.options()["matryoshka_widths"]
        groups: dict[int, list[dict[str, Any]]] = {0: [], 1: [], 2: []}
        for letter in letters:
            groups[min(bisect_right(widths, letter["latent"]), 2)].append(letter)
        cells = []
        for group in groups.values():
            n_words = sum(letter["num_probe_true_positives"] for letter in group)
            n_absorbed = sum(letter["num_full_absorption"] for letter in group)
            cells.append(f"{len(group) / len(letters):.0%}")
            cells.append(f"{n_absorbed / n_words:.3f}" if n_words else "")
        lines.append([f"{recipe}, k {k}", *cells])
    names = ("first level", "second level", "outer levels")
    columns = [column for name in names for column in (f"letters in {name}", "words absorbed")]
    return markdown_table(["SAE", *columns], lines)


def absorbers_by_level(results: Results, recipes: Sequence[str]) -> str:
    """How many words latents absorb that are in the level of their letter's latent, or elsewhere.

    All seeds together, in a row for letters whose latent is in the first level and one for others.
    """
    lines = []
    for k, recipe in itertools.product(KS, recipes):
        widths = (arm := Arm(recipe, k, 0)).options()["matryoshka_widths"]
        letters = [letter for letter in results.letters(arm) if "absorbing" in letter]
        for is_first, name in ((True, "first level"), (False, "other levels")):
            of_name = [each for each in letters if (each["latent"] < widths[0]) == is_first]
            counts = Counter[int]()
            for letter in of_name:
                level = bisect_right(widths, letter["latent"])
                levels = (bisect_right(widths, latent) for latent in letter["absorbing"])
                counts.update((each > level) - (each < level) for each in levels)
            if of_name:
                n_words = sum(letter["num_probe_true_positives"] for letter in of_name)
                cells = (n_words, counts[-1], counts[0], counts[1])
                lines.append([f"{recipe}, k {k}", name, *map(str, cells)])
    columns = ("by an inner level", "within the level", "by an outer level")
    return markdown_table(["SAE", "letter's latent", "words", *columns], lines)


def tables(results: Results, earlier: Results) -> dict[str, str]:
    """Every table of the page; `earlier` holds the SAEs trained on activations in bfloat16."""

    def whole(arms: Iterable[tuple[str, Arm]]) -> dict[str, tuple[Arm, int]]:
        return {label: (arm, arm.d_sae) for label, arm in arms}

    main = whole((f"{r}, k {k}", Arm(r, k, 0)) for k in KS for r in MAIN)
    others = (
        *("probing, top 1", "probing, top 5", "meta-SAE variance"),
        *("max cosine", "CE loss added", "firings of dense", "dead"),
    )
    nested = {label: arm for label, (arm, _) in main.items() if arm.recipe != MAIN[0]}
    nested |= {
        **{f"{r}, k 6": Arm(r, 6, 0) for r in PARTS},
        "matryoshka, k 24, layer 14": Arm(MAIN[1], 24, 0, layer=14),
        "matryoshka, k 24, lr 0.0012": Arm(MAIN[1], 24, 0, lr=1.2e-3),
    }
    levels = {
        f"{recipe}, {width}": (Arm(recipe, 24, 0), width)
        for recipe in (*MAIN[1:], "faded")
        for width in Arm(recipe, 24, 0).options()["matryoshka_widths"]
    }
    return {
        "main": table(results, "SAE", main, SCORES),
        "others": table(results, "SAE", main, others),
        "differences": differences(results, nested, DIFFERENCES),
        "earlier": differences(
            earlier,
            {
                f"{arm.recipe}, k {arm.k}": arm
                for arm in (Arm(MAIN[1], 6, 0), Arm(MAIN[1], 12, 0), Arm("wide", 12, 0))
            },
            [each for each in DIFFERENCES if each not in ("edges", "CE loss added")],
        ),
        "equal_variance": at_equal_variance(results, ("L0", *ABSORPTION, *others[:2], "edges")),
        "levels": table(results, "level", levels, (*SCORES, "dead")),
        "first_level": table(
            earlier,
            "SAE",
            whole((r, Arm(r, 12, 0)) for r in (*MAIN[:2], "wide")),
            (*SCORES, "dead"),
        ),
        "first_level_letters": letters_by_level(earlier, ("wide",)),
        "letters": letters_by_level(results, (*MAIN[1:], *PARTS)),
        "absorbers": absorbers_by_level(results, (*MAIN[1:], *PARTS)),
        "changes": table(
            results,
            "SAE",
            whole((r, Arm(r, 6, 0)) for r in (*MAIN[:2], *PARTS, MAIN[2])),
            (*SCORES, "dead"),
        ),
        "activations": by_activations(results, earlier, (*SCORES[1:], "dead")),
        "trees": table(results, "SAE", main, TREES),
        "variants": table(
            results,
            "SAE",
            whole((r, Arm(r, 24, 0)) for r in VARIANTS),
            (*SCORES, "edges", "dead"),
        ),
        "paired": paired(
            results,
            [
                *(Arm(r, 6, 0) for r in PARTS),
                *(Arm("recommended", k, 0) for k in KS),
                Arm("faded", 24, 0),
            ],
            (*DIFFERENCES[:6], "edges", "dead"),
        ),
        "width": table(
            results,
            "SAE",
            whole(
                (f"{r}, {d_sae:,} latents", Arm(r, 24, 0, d_sae=d_sae))
                for d_sae in (4096, 16384)
                for r in MAIN[:2]
            ),
            (*SCORES, "meta-SAE variance", "edges", "dead"),
            seed=0,
        ),
        "tokens": table(
            results,
            "SAE",
            whole(
                (f"{r}, {n * BATCH_SIZE / 1e6:.1f}M tokens", Arm(r, 24, 0, n_steps=n))
                for r in MAIN[:2]
                for n in (1100, 2200, 4400, 8800)
            ),
            (*SCORES, "edges", "dead"),
            seed=0,
        ),
        "layer": table(
            results,
            "SAE",
            whole((f"{r}, layer {n}", Arm(r, 24, 0, layer=n)) for n in (7, 14) for r in MAIN[:2]),
            (*SCORES, "edges", "dead"),
        ),
        "tuning": table(
            results,
            "SAE",
            whole((f"{arm.recipe}, lr {arm.lr:g}", arm) for arm in tuning_arms()),
            ("L0", "variance expl.", "dead"),
        ),
        "rate": table(
            results,
            "SAE",
            whole(
                (f"{r}, lr {lr:g}", Arm(r, 24, 0, lr=lr)) for lr in (LR, 1.2e-3) for r in MAIN[:2]
            ),
            (*SCORES, "edges", "dead"),
        ),
    }


def picture(results: Results) -> Figure:
    """Scores against L0: a point for each seed, and a line through the means."""
    shown = ("absorption, full", "latents per letter", "precision", "variance expl.")
    figure = Figure(figsize=(4 * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for axis, column in zip(axes, shown, strict=True):
        for recipe, style, shift in zip(MAIN, ("s--", "o-", "^:"), (0.97, 1, 1.03), strict=True):
            ys = {k: list(results.by_seed(Arm(recipe, k, 0), column).values()) for k in KS}
            known = {k * shift: values for k, values in ys.items() if values}
            means = [fmean(values) for values in known.values()]
            (line,) = axis.plot(list(known), means, style[1:], label=recipe)
            for x, values in known.items():
                axis.plot([x] * len(values), values, style[0], color=line.get_color(), alpha=0.7)
        axis.set(xscale="log", xlabel="L0", ylabel=column)
        axis.set_xticks(KS, map(str, KS))
        axis.minorticks_off()
    axes[-1].legend()
    return figure


def replaced(text: str, name: str, content: str) -> str:
    """The page with a table in its place.

    Raises:
        ValueError: There is no such place.
    """
    place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{PAGE} has no place for the table {name}.")
    return place.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, and draw the picture.

    Returns:
        The exit code: 0; 2 if there are no results, or the page lacks the place of a table.
    """
    parser = argparse.ArgumentParser(description="Tables and a picture of what run.py found.")
    parser.add_argument("--results", type=Path, help="default: those of docs/results/smollm2.md")
    args = parser.parse_args(argv)
    folder = args.results or PAGE.with_suffix("")
    page = folder / "report.md" if args.results else PAGE
    try:
        if not any(folder.glob("*.json")):
            raise ValueError(f"--results {folder} has no JSON file: run.py writes them.")
        results = Results(folder)
        found = tables(results, Results(folder / "bfloat16"))
        if args.results:
            filled = {name: each for name, each in found.items() if each.count("\n") > 1}
            text = "\n\n".join(f"## {name}\n\n{each}" for name, each in filled.items()) + "\n"
        else:
            text = PAGE.read_text()
            for name, each in found.items():
                text = replaced(text, name, each)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with atomic_file(page) as unfinished:
        unfinished.write_text(text)
    picture(results).savefig(page.with_suffix(".png"), dpi=130)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
