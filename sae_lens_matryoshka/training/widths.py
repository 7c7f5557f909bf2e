"""The width of each nested level: where none are given, the paper's split of the dictionary."""

import itertools
import numbers
import warnings
from collections.abc import Sequence

# Bussmann et al. (arXiv 2503.17547), section 4: 2048 / 6144 / 14336 / 30720 / 65536.
PAPER_FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)


def paper_widths(d_sae: int) -> list[int]:
    """The paper's split of a dictionary of `d_sae` latents into five nested levels.

    A dictionary too small for five distinct widths gets as many as it has room for.
    """
    return sorted({max(1, round(fraction * d_sae)) for fraction in PAPER_FRACTIONS})


def resolve_widths(widths: Sequence[int], d_sae: int) -> list[int]:
    """The level widths as training uses them: checked, complete, in a list of their own.

    An empty sequence means the paper's split. A last width other than `d_sae` gets `d_sae`
    appended with a warning, as in SAELens; the sequence passed in is never changed.

    Raises:
        ValueError: a width is not a positive integer of at most `d_sae`, or the widths do not
            strictly increase.
    """
    accepted = (
        f"strictly increasing integers from 1 to d_sae={d_sae}, such as {paper_widths(d_sae)}"
    )
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise ValueError(f"matryoshka_widths={widths!r} is not a list; accepted: {accepted}.")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, numbers.Integral):
            raise ValueError(
                f"matryoshka_widths={list(widths)} holds {width!r}, which is not an integer; "
                f"accepted: {accepted}."
            )
        if not 1 <= width <= d_sae:
            raise ValueError(
                f"matryoshka_widths={list(widths)} holds {width}, outside 1 to {d_sae}; "
                f"accepted: {accepted}."
            )
    resolved = [int(width) for width in widths] or paper_widths(d_sae)
    if any(inner >= outer for inner, outer in itertools.pairwise(resolved)):
        raise ValueError(
            f"matryoshka_widths={resolved} does not strictly increase; accepted: {accepted}."
        )
    if resolved[-1] != d_sae:
        warnings.warn(
            f"matryoshka_widths={resolved} does not end at d_sae={d_sae}: a last level of "
            f"{d_sae} latents is added.",
            stacklevel=5,  # the caller of the config's constructor
        )
        resolved.append(d_sae)
    return resolved
