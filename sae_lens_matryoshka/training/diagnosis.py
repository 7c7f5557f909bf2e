"""What is wrong with a Matryoshka SAE, told from a few numbers, and what to try."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from sae_lens_matryoshka.util.checks import checked_number

# Nesting costs a few points of variance explained; a larger gap has another cause.
BASELINE_GAP = 0.05
# Levels closer than both of these count as one; runs with other seeds differ by more.
SAME_EXPLAINED_VARIANCE = 0.01
SAME_L0 = 0.02  # of the whole SAE's
# Half, because latents that learnt equally frequent features scatter around their median.
RARE_RATE = 0.5  # of the outermost level's median rate
# A few rare latents in a level are usual; these many take room from more frequent features.
RARE_SHARE = 0.25  # of the latents that an inner level adds
# On fewer tokens a latent of average frequency may stay silent by chance.
MIN_TOKENS = 10_000
# A latent of one feature is rarely active on more than this; merged parents add up.
DENSE_LEVEL = 0.25  # active share of a level's latents on the average token
# 0.21 to 0.45 at a fitting k (synthetic data, the demo's model), 0.11 to 0.19 at one far larger.
WEAK_HALF = 0.2  # of the sum of scores
# With more unexplained than this, weak codes may still be needed.
LITTLE_LEFT = 0.1
# Latents of features are sparse; where k asks for more than there are, most codes are not.
DENSE_RATE = 0.2  # share of tokens on which a latent is active
DENSE_CODES = 0.5  # share of all codes that are of such latents
# BatchTopK keeps k per token wherever it finds as many scores above 0.
FEWER_THAN_K = 0.9
# On synthetic data: 0.1 where k is near the true L0, 0.5 where it is a fifth of it.
STRONG_MARGIN = 0.2  # unexplained variance × (score of the weakest tenth / mean score)²


class Finding(NamedTuple):
    """A fault that was recognised.

    Attributes:
        kind: "undertrained", "baseline", "close levels", "rare inner latents", "narrow level",
            "k too large" or "k too small".
        message: What was measured, and what to try.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class Measured:
    """What a diagnosis is made from: one SAE on one set of activations.

    Attributes:
        widths: Widths of the P levels, smallest first.
        explained_variance: Variance explained by each level, 1 − E‖x − x̂‖² / E‖x − E x‖².
        l0: Of each level, mean number of active latents per token.
        firing_rates: (d_sae,) share of the tokens on which each latent is active.
        n_tokens: That all this was measured on.
        weak_score: Score below which a tenth of the active ones lie, over their mean; a score is
            the norm of what a code adds to the reconstruction.
        weak_half: Share of the sum of the active scores that the weaker half of them has.
        k: Latents per token that training asked for.
        baseline_explained_variance: That of a BatchTopK SAE of this width and k; None if unknown.
        is_ordered_by_frequency: Whether levels are made of the latents that fire most often.
        expected_gain: What training is still expected to add to the variance explained.
    """

    widths: Sequence[int]
    explained_variance: Sequence[float]
    l0: Sequence[float]
    firing_rates: torch.Tensor
    n_tokens: int
    weak_score: float
    weak_half: float
    k: float
    baseline_explained_variance: float | None = None
    expected_gain: float = 0.0
    is_ordered_by_frequency: bool = False


def diagnose(measured: Measured) -> list[Finding]:
    """The faults that these numbers show, at most one of each kind."""
    if measured.l0[-1] == 0:
        return [Finding("k too small", "No latent is active on any token: try a larger k.")]
    if measured.explained_variance[-1] <= 0:  # then no other number says anything
        return [
            Finding(
                "undertrained",
                f"The whole SAE explains {measured.explained_variance[-1]:.1%} of the variance, "
                "less than the mean activation does. Try more steps or a larger learning rate; "
                "or these activations differ in their scale or layer from those of training.",
            )
        ]
    findings = [*_baseline(measured), *_close_levels(measured)]
    # Too many or too few codes fill or empty every level; widths are then not to blame.
    return findings + (
        [*_k(measured)] or [*_rare_inner_latents(measured), *_narrow_level(measured)]
    )


def check_baseline(name: str, value: Any) -> float:
    """The variance explained of a baseline, checked.

    Raises:
        ValueError: naming `name`, the value and what is accepted.
    """
    accepted = "a share above 0 and at most 1, such as 0.78"
    return checked_number(name, value, accepted, above=0, most=1)


def _baseline(measured: Measured) -> Iterator[Finding]:
    baseline, reached = measured.baseline_explained_variance, measured.explained_variance[-1]
    if baseline is None or reached + measured.expected_gain >= baseline - BASELINE_GAP:
        return
    yield Finding(
        "baseline",
        f"The whole SAE explains {reached:.1%} of the variance, {100 * (baseline - reached):.1f} "
        f"points less than the BatchTopK baseline's {baseline:.1%}. Try fewer or wider inner "
        "levels, a lower weight for them (level_weights), or longer training.",
    )


def _close_levels(measured: Measured) -> Iterator[Finding]:
    levels = zip(measured.widths, measured.explained_variance, measured.l0, strict=True)
    close = [
        f"{inner[0]} and {outer[0]} ({100 * (outer[1] - inner[1]):+.1f} points of variance "
        f"explained, {outer[2] - inner[2]:+.2f} L0)"
        for inner, outer in pairwise(levels)
        if abs(outer[1] - inner[1]) < SAME_EXPLAINED_VARIANCE
        and abs(outer[2] - inner[2]) < SAME_L0 * measured.l0[-1]
    ]
    if close:
        yield Finding(
            "close levels",
            f"These levels hardly differ: {', '.join(close)}. Try fewer levels, or widths that "
            "grow by a factor of two or more.",
        )


def _rare_inner_latents(measured: Measured) -> Iterator[Finding]:
    if len(measured.widths) < 2 or measured.n_tokens < MIN_TOKENS:
        return
    rates = measured.firing_rates
    median = rates[measured.widths[-2] :].median().item()
    rare = (rates < RARE_RATE * median) | (rates == 0)
    found = []
    for start, end in pairwise([0, *measured.widths[:-1]]):
        n_rare = int(rare[start:end].sum())
        if n_rare > RARE_SHARE * (end - start):
            n_dead = int((rates[start:end] == 0).sum())
            found.append(
                f"{n_rare} of the {end - start} latents that level {end} adds ({n_dead} dead)"
            )
    if found:
        yield Finding(
            "rare inner latents",
            f"{', '.join(found)} fire "
            + (
                f"less than half as often as the median latent of the outermost level, which is "
                f"active on {median:.2g} of the tokens, or never. Try "
                if median
                else "never. Try "
            )
            + ("" if measured.is_ordered_by_frequency else 'latent_order="frequency" or ')
            + "a narrower inner level.",
        )


def _narrow_level(measured: Measured) -> Iterator[Finding]:
    # The whole is as dense as k and d_sae make it; it is the inner levels that merge features.
    inner = list(zip(measured.widths, measured.l0, strict=True))[:-1]
    dense = [
        f"{l0:.2f} of {width} ({l0 / width:.0%})" for width, l0 in inner if l0 > DENSE_LEVEL * width
    ]
    if dense:
        yield Finding(
            "narrow level",
            "On the average token these many latents of an inner level are active: "
            f"{', '.join(dense)}. Levels narrower than the data asks for merge features that "
            "occur together (hedging, arXiv 2505.11756). Try a wider first level, or a lower "
            "weight for inner levels (level_weights).",
        )


def _k(measured: Measured) -> Iterator[Finding]:
    k, l0 = measured.k, measured.l0[-1]
    rates = measured.firing_rates
    dense_codes = (rates[rates > DENSE_RATE].sum() / rates.sum()).item()
    unexplained = 1 - measured.explained_variance[-1]
    if l0 < FEWER_THAN_K * k:
        yield Finding(
            "k too large",
            f"Of k={k:g}, only {l0:.2f} latents are active on the average token: fewer scores are "
            "positive, or the threshold of a saved SAE does not fit these activations "
            "(calibrate_threshold). Try a smaller k.",
        )
    elif unexplained * measured.weak_score**2 > STRONG_MARGIN:
        yield Finding(
            "k too small",
            f"{unexplained:.0%} of the variance is unexplained, while nine in ten of the k={k:g} "
            f"active latents are above {measured.weak_score:.0%} of the mean activation: those "
            "just left out would explain nearly as much each. Try a larger k.",
        )
    elif measured.weak_half < WEAK_HALF and unexplained < LITTLE_LEFT:
        yield Finding(
            "k too large",
            f"The weaker half of the k={k:g} active latents has only {measured.weak_half:.0%} of "
            f"the sum of their activations, with {unexplained:.1%} of the variance unexplained: "
            "it adds next to nothing. Try a smaller k.",
        )
    elif dense_codes > DENSE_CODES:
        yield Finding(
            "k too large",
            f"{dense_codes:.0%} of the k={k:g} active latents of the average token are active on "
            f"more than {DENSE_RATE:.0%} of all tokens: such dense latents rarely stand "
            "for one feature. Try a smaller k.",
        )
