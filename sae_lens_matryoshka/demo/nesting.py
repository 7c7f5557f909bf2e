"""What the nesting does, in words: latents of the first level, those that specialise them, and what
BatchTopK has in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

CONTAINED = 0.95  # of a latent's tokens, for it to specialise another
SILENT = 0.2  # of the tokens, for a latent to have a hole there
FIRING = 0.8  # of the tokens, for a latent to cover them
_N_TOKENS = 6  # named of each latent
_MIN_TOKENS = 40  # that a latent fires on, to be told of
_MAX_FREQUENCY = 0.3  # of a first-level latent; what nearly always fires contains everything


@dataclass(frozen=True)
class Latent:
    """One latent and what it fires on.

    Attributes:
        index: Its place in the dictionary.
        level: The first level that has it, from 1 on; None for BatchTopK's.
        n_tokens: Tokens it fires on.
        top_tokens: Those with the largest sum of activations.
    """

    index: int
    level: int | None
    n_tokens: int
    top_tokens: list[str]

    def __str__(self) -> str:
        level = "" if self.level is None else f"level {self.level}, "
        shown = (token.strip() or repr(token)[1:-1] for token in self.top_tokens)
        tokens = " ".join(f"`{token}`" for token in shown)
        return f"latent {self.index} ({level}{self.n_tokens} tokens: {tokens})"


@dataclass(frozen=True)
class Family:
    """A first-level latent, the latents that specialise it, and BatchTopK's counterpart.

    Attributes:
        parent: The latent of the first level.
        children: (latent of a later level, share of its tokens on which the parent fires).
        counterpart: BatchTopK's latent that fires most nearly where the parent does.
        f1: How nearly: of their tokens.
        holes: (child, BatchTopK's latent that fires on its tokens while the counterpart does not,
            share of them on which the counterpart fires).
        parts: BatchTopK's latents that only together fire where the parent does, if it has no
            single one that does.
    """

    parent: Latent
    children: list[tuple[Latent, float]]
    counterpart: Latent
    f1: float
    holes: list[tuple[Latent, Latent, float]] = field(default_factory=list)
    parts: list[Latent] = field(default_factory=list)


def families(
    feature_acts: torch.Tensor,
    baseline_acts: torch.Tensor,
    tokens: Sequence[str],
    widths: Sequence[int],
    n_families: int = 3,
    n_children: int = 3,
) -> list[Family]:
    """First-level latents that have the most latents of later levels inside them.

    Args:
        feature_acts: (T, d_sae) activations of the Matryoshka SAE.
        baseline_acts: (T, d_sae) those of BatchTopK on the same tokens.
        tokens: The T tokens as text.
        widths: Level widths.
        n_families: How many to return at most.
        n_children: Latents in each at most, the most often firing ones.
    """
    fires = (feature_acts > 0).float()
    baseline = (baseline_acts > 0).float()
    counts, baseline_counts = fires.sum(0), baseline.sum(0)
    first = widths[0]
    shared = fires[:, :first].T @ fires[:, first:]  # (first, the others): tokens in common
    contained = shared / counts[first:].clamp(min=1)
    frequent = counts[:first] <= _MAX_FREQUENCY * len(tokens)
    smaller = counts[first:] <= counts[:first, None] / 2
    is_child = (contained >= CONTAINED) & frequent[:, None] & smaller
    is_child &= counts[first:] >= _MIN_TOKENS
    # A latent inside two parents belongs to the rarer one, in which it tells more.
    best = torch.where(is_child, counts[:first, None], torch.inf).argmin(0)
    is_child &= torch.arange(first)[:, None] == best

    named = _Namer(tokens)
    result = []
    for parent in is_child.sum(1).argsort(descending=True, stable=True).tolist():
        inside = is_child[parent].nonzero().flatten()
        if len(inside) == 0 or len(result) == n_families:
            break
        inside = inside[counts[first:][inside].argsort(descending=True, stable=True)][:n_children]
        common = fires[:, parent] @ baseline
        f1 = 2 * common / (baseline_counts + counts[parent]).clamp(min=1)
        counterpart = int(f1.argmax())
        children = [int(child) + first for child in inside]
        level_of = [sum(width <= child for width in widths) + 1 for child in children]
        described = [
            named(feature_acts, child, level)
            for child, level in zip(children, level_of, strict=True)
        ]
        result.append(
            Family(
                parent=named(feature_acts, parent, 1),
                children=[
                    (latent, contained[parent, latent.index - first].item()) for latent in described
                ],
                counterpart=named(baseline_acts, counterpart, None),
                f1=f1[counterpart].item(),
                holes=[
                    (latent, named(baseline_acts, other, None), share)
                    for latent in described
                    for other, share in _hole(fires[:, latent.index], baseline, counterpart)
                ],
                parts=[
                    named(baseline_acts, part, None)
                    for part in _parts(fires[:, parent], baseline, f1[counterpart].item())
                ],
            )
        )
    return result


def _hole(child: torch.Tensor, baseline: torch.Tensor, counterpart: int) -> list[tuple[int, float]]:
    """BatchTopK's latent that took a child's tokens from the counterpart, if one has."""
    share = child @ baseline / child.sum()
    own = share[counterpart].item()
    precision = child @ baseline / baseline.sum(0).clamp(min=1)
    candidates = torch.where(precision >= 0.5, share, torch.zeros(()))
    other = int(candidates.argmax())
    if own <= SILENT and candidates[other] >= FIRING:
        return [(other, own)]
    return []


def _parts(parent: torch.Tensor, baseline: torch.Tensor, f1: float) -> list[int]:
    """BatchTopK's latents that fire only where the parent does and together nearly everywhere; none
    where one latent does as well, or no few of them do."""
    if f1 >= FIRING:
        return []
    inside = parent @ baseline / baseline.sum(0).clamp(min=1) >= FIRING
    left, parts = parent.clone(), []
    while left.sum() > (1 - FIRING) * parent.sum():
        gains = torch.where(inside, left @ baseline, torch.zeros(()))
        part = int(gains.argmax())
        if len(parts) == 8 or gains[part] < 0.05 * parent.sum():
            return []
        parts.append(part)
        left = left * (1 - baseline[:, part])
    return parts if len(parts) > 1 else []


class _Namer:
    """Describes latents by their tokens."""

    def __init__(self, tokens: Sequence[str]):
        self._names = list(dict.fromkeys(tokens))
        ids = {name: i for i, name in enumerate(self._names)}
        self._ids = torch.tensor([ids[token] for token in tokens])

    def __call__(self, acts: torch.Tensor, index: int, level: int | None) -> Latent:
        sums = torch.zeros(len(self._names)).index_add_(0, self._ids, acts[:, index])
        top = sums.topk(min(_N_TOKENS, len(sums))).indices.tolist()
        top = [self._names[i] for i in top if sums[i] > 0]
        return Latent(index, level, int((acts[:, index] > 0).sum()), top)


_LEGEND = (
    "Each latent is shown with the tokens that it fires on most. A latent of a later level is "
    "inside one of the first level if that one fires on nearly all of its tokens: it tells apart "
    "what the first gathers. BatchTopK's nearest is the latent whose tokens agree best (F1); it "
    "has a hole where it is silent and another latent fires instead."
)


def describe(found: Sequence[Family]) -> str:
    """The families in sentences."""
    if not found:
        return "No latent of a later level fires only where one of the first level does."
    paragraphs = [_LEGEND]
    for family in found:
        lines = [f"**Level 1:** {family.parent}."]
        lines += [
            f"- inside it, on {share:.0%} of its own tokens: {child}"
            for child, share in family.children
        ]
        lines.append(f"- BatchTopK's nearest (F1 {family.f1:.2f}): {family.counterpart}")
        lines += [
            f"- a hole in BatchTopK's: it fires on {share:.0%} of the tokens of latent "
            f"{child.index}, where {other} fires instead"
            for child, other, share in family.holes
        ]
        if family.parts:
            parts = ", ".join(map(str, family.parts))
            lines.append(f"- split in BatchTopK, which covers level 1's only by {parts}")
        if not family.holes and not family.parts:
            lines.append(
                "- no hole at these tokens and no split"
                if family.f1 >= FIRING
                else "- nor do a few of BatchTopK's latents together fire where level 1's does"
            )
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)
