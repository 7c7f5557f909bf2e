"""Checks of options; their errors name the option, its value and what is accepted."""

import math
import numbers
from typing import Any, TypeGuard

_COUNTS = {0: "an integer of 0 or more", 1: "a positive integer"}


def invalid_option(name: str, value: Any, accepted: str) -> ValueError:
    """The error for a value that is not accepted."""
    return ValueError(f"{name}={value!r} is not accepted: give {accepted}.")


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`, also if it is one of numpy's, which JSON can't hold.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise invalid_option(name, value, _COUNTS.get(least, f"an integer of {least} or more"))
    return int(value)


def checked_number(
    name: str,
    value: Any,
    accepted: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """`value` as a finite float above `above`, from `least` to `most`.

    Raises:
        ValueError: it is anything else; the error ends with "give {accepted}.".
    """
    if not is_number(value) or not (value > above and least <= value <= most):
        raise invalid_option(name, value, accepted)
    return float(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite real number, which true and false are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
