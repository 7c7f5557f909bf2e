"""Which latents to change, and how; and random ones to compare with."""

import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE

from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.util.checks import checked_number, invalid_option

MODES = ("add", "set", "scale", "ablate")

Latents = Mapping[int, float] | Iterable[int]


class Changes(NamedTuple):
    """Latents to change, each with the value of the mode.

    Attributes:
        latents: Their numbers, without repetition.
        values: One for each; zeros for "ablate".
        mode: One of `MODES`.
    """

    latents: list[int]
    values: list[float]
    mode: str

    def of(self, acts: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        """a′ − a for the activations a of the latents."""
        values = torch.tensor(self.values, device=acts.device)
        if self.mode == "add":
            return values.expand_as(acts)
        return (acts * values if self.mode == "scale" else values) - acts


def checked_changes(sae: SAE[Any], latents: Latents, mode: str) -> Changes:
    """What `steer` was given.

    Raises:
        ValueError: an unknown mode, a latent that is not in the SAE, a value that is not a finite
            number, or a value with "ablate" or none with another mode.
    """
    if mode not in MODES:
        raise invalid_option("mode", mode, ", ".join(map(repr, MODES)))
    has_values = isinstance(latents, Mapping)
    if has_values and mode == "ablate":
        raise ValueError("mode='ablate' takes no values: give the latents alone, such as [23].")
    if not has_values and mode != "ablate":
        raise ValueError(f"mode={mode!r} takes a value for each latent: give such as {{23: 4.0}}.")
    d_sae = sae.cfg.d_sae
    numbers = list(dict.fromkeys(latents))
    for latent in numbers:
        is_integer = isinstance(latent, int) and not isinstance(latent, bool)
        if not is_integer or not 0 <= latent < d_sae:
            raise invalid_option("latent", latent, f"0 to {d_sae - 1}")
    values = [0.0] * len(numbers)
    if isinstance(latents, Mapping):
        values = [
            checked_number(f"value of latent {latent}", value, "a finite number")
            for latent, value in latents.items()
        ]
    return Changes(numbers, values, mode)


def latents_of_level(sae: SAE[Any], level: int) -> range:
    """The latents of a level; 0 is the innermost.

    Raises:
        ValueError: the SAE has no levels, or not this one.
    """
    bounds = list(pairwise([0, *widths_of(sae)]))
    if level not in range(len(bounds)):
        raise invalid_option("level", level, f"0 to {len(bounds) - 1}")
    return range(*bounds[level])


def control_latents(sae: SAE[Any], latents: list[int], seed: int) -> list[int]:
    """For each latent another of its level, at random.

    None of them is among `latents`, unless these are more than half of their level; then their
    whole level is shuffled. Without levels all latents are of one.

    Raises:
        ValueError: a level has one latent alone.
    """
    try:
        widths = widths_of(sae)
    except ValueError:
        widths = [sae.cfg.d_sae]
    starts = [0, *widths]
    drawn = random.Random(seed)
    found: dict[int, int] = {}
    for level, (start, end) in enumerate(pairwise(starts)):
        own = [latent for latent in latents if bisect_right(widths, latent) == level]
        steered = set(own)
        others = [latent for latent in range(start, end) if latent not in steered]
        if len(others) >= len(own):
            found.update(zip(own, drawn.sample(others, len(own)), strict=True))
        elif end - start == 1:
            raise ValueError(f"latent {start} is alone in its level, so there is no control.")
        else:  # the next in a random circle is another
            circle = drawn.sample(range(start, end), end - start)
            following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
            found.update((latent, following[latent]) for latent in own)
    return [found[latent] for latent in latents]
