"""Schedules over training steps: of k, and of the weights of inner levels."""

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sae_lens_matryoshka.util.checks import checked_count, checked_number, invalid_option


def linear(start: float, end: float, step: int, n_steps: int) -> float:
    """`start` until step 0, `end` from step `n_steps` on, a straight line between."""
    if step >= n_steps and step >= 0:
        return end
    return start + (end - start) * max(step, 0) / max(n_steps, 1)


@dataclass(kw_only=True)
class SparsitySchedule:
    """A k that starts high and falls linearly to `k`, for a config that has a `k`."""

    if TYPE_CHECKING:  # fields of SAELens' config
        k: Any
        d_sae: int

    k_start: float | None = None
    """k at the first step; `k` throughout if None. (Chanin's variants on SynthSAEBench go from 80
    to 25.)"""

    k_anneal_steps: int = 0
    """Steps over which k falls from `k_start` to `k`."""

    k_is_integer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_k()
        super().__post_init__()  # type: ignore[misc]

    def _check_k(self) -> None:
        kind = "an integer" if self.k_is_integer else "a number"
        accepted = f"{kind} above 0 and at most d_sae={self.d_sae}"
        k = checked_number("k", self.k, accepted, above=0, most=self.d_sae)
        if self.k_is_integer and k % 1:
            raise invalid_option("k", self.k, accepted)
        self.k = int(k) if self.k_is_integer or isinstance(self.k, numbers.Integral) else k
        self.k_anneal_steps = checked_count("k_anneal_steps", self.k_anneal_steps, 0)
        if self.k_start is None:
            if self.k_anneal_steps:
                raise invalid_option("k_anneal_steps", self.k_anneal_steps, "it only with k_start")
            return
        accepted = f"a number from k={self.k}, where the schedule ends, to d_sae={self.d_sae}"
        self.k_start = checked_number(
            "k_start", self.k_start, accepted, least=self.k, most=self.d_sae
        )
        if self.k_anneal_steps == 0:
            raise invalid_option("k_start", self.k_start, "it only with k_anneal_steps")

    def k_at(self, step: int) -> float:
        """k at a training step."""
        if self.k_start is None:
            return self.k
        return linear(self.k_start, self.k, step, self.k_anneal_steps)
