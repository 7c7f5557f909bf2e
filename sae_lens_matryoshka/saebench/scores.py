"""Scores over seeds: means, intervals, and which differences are larger than the spread."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from scipy import stats

from sae_lens_matryoshka.saebench.evaluations import (
    EVALUATIONS,
    L0,
    Metric,
    read_metrics,
    result_file,
)
from sae_lens_matryoshka.saebench.records import Candidate, Record
from sae_lens_matryoshka.util.files import atomic_file

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """One metric of one candidate."""

    evaluation: str  # a key of `EVALUATIONS`
    metric: Metric
    candidate: Candidate
    values: Mapping[int, float]  # seed → value

    @property
    def is_headline(self) -> bool:
        """Whether it is the evaluation's first metric."""
        return self.metric == EVALUATIONS[self.evaluation].metrics[0]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None if there are fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % confidence interval of the mean over seeds; None from one seed."""
        if self.std is None:
            return None
        n = len(self.values)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * self.std / n**0.5
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        """Mean and standard deviation as tables show them."""
        digits = 2 if abs(self.mean) >= 10 else 3
        std = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{std}"


def are_apart(a: Score, b: Score) -> bool:
    """Whether the intervals of two scores do not overlap; never from one seed."""
    if a.interval is None or b.interval is None:
        return False
    return a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]


def read_scores(record: Record, out: Path) -> list[Score]:
    """Every metric of `EVALUATIONS` in the results of an output folder."""
    scores = []
    for evaluation in record.settings:
        folders = {f.name.removeprefix("seed_"): f for f in (out / evaluation).glob("seed_*")}
        by_seed = {int(seed): folder for seed, folder in folders.items() if seed.isdecimal()}
        for candidate in record.candidates:
            by_metric: dict[Metric, dict[int, float]] = {}
            for seed, folder in sorted(by_seed.items()):
                file = result_file(folder, evaluation, candidate.key)
                for metric, value in read_metrics(file, evaluation).items():
                    by_metric.setdefault(metric, {})[seed] = value
            for metric, values in by_metric.items():
                scores.append(Score(evaluation, metric, candidate, values))
    return scores


def l0_by_key(scores: Sequence[Score]) -> dict[str, float]:
    """Key of a candidate → mean active latents per token, of those that core has measured."""
    return {score.candidate.key: score.mean for score in scores if score.metric.key == L0}


def comparisons(scores: Sequence[Score]) -> list[str]:
    """A sentence on each whole SAE against each baseline, for each evaluation's first metric.

    Two whose intervals overlap are not ranked.
    """
    whole = [score for score in scores if score.is_headline and score.candidate.is_whole]
    own = [score for score in whole if not score.candidate.is_baseline]
    baselines = [score for score in whole if score.candidate.is_baseline]
    l0 = l0_by_key(scores)
    return [
        _comparison(*pair, l0)
        for evaluation in EVALUATIONS
        for pair in product(own, baselines)
        if all(score.evaluation == evaluation for score in pair)
    ]


def _comparison(own: Score, other: Score, l0: Mapping[str, float]) -> str:
    names = ", ".join(
        f"{c.label} {score} ({f'L0 {l0[c.key]:.3g}' if c.key in l0 else 'L0 not measured'})"
        for score in (own, other)
        for c in [score.candidate]
    )
    evaluation = EVALUATIONS[own.evaluation]
    if not evaluation.is_ranked:
        verdict = "not ranked, read it as a range"
    elif own.interval is None or other.interval is None:
        reason = "from one seed" if evaluation.is_random else "it has no spread"
        verdict = f"not ranked, {reason}"
    elif not are_apart(own, other):
        verdict = f"not ranked, the {CONFIDENCE:.0%} intervals of the means overlap"
    else:
        is_better = (own.mean < other.mean) == own.metric.lower_is_better
        better = own.candidate.label if is_better else other.candidate.label
        verdict = f"{better} is better, the {CONFIDENCE:.0%} intervals are apart"
    return f"{own.metric.label}: {names}: {verdict}."


def write_summary(record: Record, scores: Sequence[Score], out: Path) -> None:
    """`summary.json`: all scores, comparisons and what was not run."""
    l0 = l0_by_key(scores)
    content = {
        "model_name": record.model_name,
        "saes": [
            {
                "title": candidate.title,
                **candidate.model_dump(exclude={"matryoshka_widths", "model_name"}),
                "sha256": record.fingerprints[candidate.label],
                "l0": l0.get(candidate.key),
            }
            for candidate in record.candidates
        ],
        "scores": [
            {
                "evaluation": score.evaluation,
                "metric": score.metric.key,
                "label": score.metric.label,
                "lower_is_better": score.metric.lower_is_better,
                "sae": score.candidate.title,
                "width": score.candidate.width,
                "mean": score.mean,
                "std": score.std,
                "interval": score.interval,
                "values": score.values,
            }
            for score in scores
        ],
        "comparisons": comparisons(scores),
        "not_run": [
            {"evaluation": evaluation, "sae": title, "reason": reason}
            for evaluation, title, reason in not_run(record)
        ],
        "settings": record.settings,
        "seconds": record.seconds,
    }
    with atomic_file(out / "summary.json") as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def not_run(record: Record) -> list[tuple[str, str, str]]:
    """Evaluation, title of the SAE and reason of each missing result."""
    titles = {candidate.key: candidate.title for candidate in record.candidates}
    return [
        (evaluation, titles[key], " ".join(reason.split()))
        for evaluation, reasons in record.not_run.items()
        for key, reason in reasons.items()
    ]
