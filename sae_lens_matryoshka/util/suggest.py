"""Suggestions for names that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a sentence that says that `name` is not known.

    Args:
        name: What was given.
        names: What is known.
        cutoff: How alike two names have to be, from 0 to 1.

    Returns:
        "; did you mean A or B?" with the nearest of `names`, at most three; "." where none is near.
    """
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else "."
