"""Numbers as the page's files hold them."""

import math


def rounded(value: float, digits: int = 3) -> float | None:
    """A number with so many significant digits, for JSON, which has no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
