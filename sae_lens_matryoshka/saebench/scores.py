"""What SAEBench's files say, over seeds: means, spreads, and which differences are real."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from scipy import stats

from sae_lens_matryoshka.saebench.candidates import Candidate
from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, L0, Metric, result_file, shown
from sae_lens_matryoshka.saebench.suite import Record
from sae_lens_matryoshka.util.files import atomic_file

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """One metric of one candidate.

    Attributes:
        evaluation: A key of `EVALUATIONS`.
        metric: What was measured.
        candidate: The SAE or level.
        values: Seed → value.
    """

    evaluation: str
    metric: Metric
    candidate: Candidate
    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None from fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean over all seeds lies with 95 % confidence (Student); None from one seed."""
        if self.std is None:
            return None
        n = len(self.values)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * self.std / n**0.5
        return self.mean - half, self.mean + half


def are_apart(a: Score, b: Score) -> bool:
    """Whether the intervals of two scores do not overlap; never from one seed."""
    if a.interval is None or b.interval is None:
        return False
    return a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]


def read_scores(record: Record, out: Path) -> list[Score]:
    """Every number of `EVALUATIONS` that the results in an output folder hold."""
    scores = []
    for evaluation in record.settings:
        seeds = record.seeds(out, evaluation)
        for candidate in record.candidates:
            by_metric: dict[Metric, dict[int, float]] = {}
            for seed in seeds:
                file = result_file(out / evaluation / f"seed_{seed}", evaluation, candidate.key)
                for metric, value in shown(file, evaluation).items():
                    by_metric.setdefault(metric, {})[seed] = value
            for metric, values in by_metric.items():
                scores.append(Score(evaluation, metric, candidate, values))
    return scores


def l0_of(scores: list[Score], candidate: Candidate) -> float | None:
    """Mean active latents per token, as core measured them; None where it was not run."""
    for score in scores:
        if score.metric.key == L0 and score.candidate == candidate:
            return score.mean
    return None


def comparisons(scores: list[Score]) -> list[str]:
    """A sentence on each whole SAE against each baseline, for each evaluation's first metric.

    Two whose intervals overlap are not ranked.
    """
    sentences: list[str] = []
    for evaluation, description in EVALUATIONS.items():
        whole = [
            score
            for score in scores
            if score.evaluation == evaluation
            and score.metric == description.metrics[0]
            and score.candidate.width == score.candidate.d_sae
        ]
        own = [score for score in whole if not score.candidate.is_baseline]
        baselines = [score for score in whole if score.candidate.is_baseline]
        sentences += [_compared(*pair, scores) for pair in product(own, baselines)]
    return sentences


def _compared(own: Score, other: Score, scores: list[Score]) -> str:
    names = ", ".join(
        f"{score.candidate.label} {spread(score)} ({_told_l0(scores, score.candidate)})"
        for score in (own, other)
    )
    if not EVALUATIONS[own.evaluation].is_ranked:
        verdict = "not ranked, read it as a range"
    elif own.interval is None or other.interval is None:
        verdict = (
            "not ranked, from one seed"
            if EVALUATIONS[own.evaluation].is_random
            else "not ranked, it has no spread"
        )
    elif not are_apart(own, other):
        verdict = f"not ranked, the {CONFIDENCE:.0%} intervals of the means overlap"
    else:
        is_better = (own.mean < other.mean) == own.metric.lower_is_better
        better = own.candidate.label if is_better else other.candidate.label
        verdict = f"{better} is better, the {CONFIDENCE:.0%} intervals are apart"
    return f"{own.metric.label}: {names}: {verdict}."


def _told_l0(scores: list[Score], candidate: Candidate) -> str:
    l0 = l0_of(scores, candidate)
    return "L0 not measured" if l0 is None else f"L0 {l0:.3g}"


def spread(score: Score) -> str:
    """Mean and standard deviation as they are printed."""
    digits = 2 if abs(score.mean) >= 10 else 3
    std = "" if score.std is None else f" ± {score.std:.{digits}f}"
    return f"{score.mean:.{digits}f}{std}"


def write_summary(record: Record, scores: list[Score], out: Path) -> None:
    """`summary.json`: all scores, comparisons and what was not run."""
    content = {
        "model_name": record.model_name,
        "saes": [
            {
                "title": candidate.title,
                "label": candidate.label,
                "width": candidate.width,
                "d_sae": candidate.d_sae,
                "is_baseline": candidate.is_baseline,
                "source": list(candidate.source),
                "sha256": record.fingerprints[candidate.label],
                "l0": l0_of(scores, candidate),
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
    """Evaluation, SAE and reason, of each result that is not there."""
    titles = {candidate.key: candidate.title for candidate in record.candidates}
    return [
        (evaluation, titles[key], " ".join(reason.split()))
        for evaluation, reasons in record.not_run.items()
        for key, reason in reasons.items()
    ]
