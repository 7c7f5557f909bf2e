"""Means over seeds of training, and what may be said of a difference."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats


class Value(NamedTuple):
    """A mean over seeds of training.

    Attributes:
        mean: The mean.
        half: Half of its 95 % interval; None from one seed.
        n: Number of seeds.
    """

    mean: float
    half: float | None
    n: int


def mean(values: Iterable[float]) -> Value | None:
    """The mean, with Student's interval; None of no values."""
    values = list(values)
    if not values:
        return None
    half = None
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Value(statistics.fmean(values), half, len(values))


def difference(values: Iterable[float], baseline: Iterable[float]) -> Value | None:
    """The difference of two means, with Welch's interval; n is the smaller number of seeds."""
    values, baseline = list(values), list(baseline)
    if not (values and baseline):
        return None
    n = min(len(values), len(baseline))
    half = None
    if n > 1:
        interval = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval(0.95)
        half = float(interval.high - interval.low) / 2
    return Value(statistics.fmean(values) - statistics.fmean(baseline), half, n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float | None]
) -> Value | None:
    """The mean difference of those seeds (the keys) that both have, with Student's interval."""
    pairs = ((value, baseline.get(seed)) for seed, value in values.items())
    return mean(value - other for value, other in pairs if other is not None)


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """y at x on the lines that join the points; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(sorted(points)):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None
