"""Progress bars in a file: a line every five minutes, where a terminal redraws one line."""

import time
from typing import Any

from tqdm.std import tqdm

SECONDS = 300  # between two lines of one bar


def print_bars_as_lines() -> None:
    """Let every tqdm bar of this process, those of libraries too, suit the file it writes to.

    Redrawn there, a bar leaves each of its states, joined by carriage returns. A bar that writes to
    a terminal stays as it is.
    """
    tqdm.display, tqdm.close = _display_line, _close_silently


# bars may end after the names of this module are gone, so the functions hold what they call
def _display_line(
    bar: Any, msg: str | None = None, pos: int | None = None, display: Any = tqdm.display
) -> bool:
    if bar.fp.isatty():
        return display(bar, msg, pos)
    now = time.monotonic()
    if now - bar.__dict__.setdefault("line_written_at", now) >= SECONDS:
        bar.line_written_at = now
        bar.fp.write(bar.format_meter(**{**bar.format_dict, "ncols": 0}) + "\n")  # without the bar
    return True


def _close_silently(bar: Any, close: Any = tqdm.close) -> None:
    if not getattr(bar, "disable", True) and not bar.fp.isatty():
        bar.delay = float("inf")  # tqdm then takes the bar for one that was never displayed
    close(bar)
