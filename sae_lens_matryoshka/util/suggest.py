"""Suggestions for unknown names."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a sentence that says that `name` is unknown.

    Args:
        name: What was given.
        names: The known names.
        cutoff: How similar two names have to be, from 0 to 1.

    Returns:
        "; did you mean A or B?" with at most three similar names; "." if there are none.
    """
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else "."
