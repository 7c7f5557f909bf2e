"""What libraries print in a command: bars that suit a file, and no advice on what is done."""

import logging
import time
import warnings
from typing import Any

from tqdm.std import tqdm

FIRST, SECONDS = 10, 60  # until the first line of a bar, and between two others


def tidy_output() -> None:
    """Let libraries print in this process what helps whoever runs a command.

    Where a tqdm bar writes to a file, it becomes a line after ten seconds and each minute; redrawn
    there, it leaves each of its states. On a terminal it stays as it is. Left out is what SAELens
    says on arguments for the model, with which commands load it, and what datasets says on an
    argument that SAELens passes.
    """
    bars: Any = tqdm  # its own class, of which those of libraries are subclasses
    bars.display, bars.close = _display_line, _close_silently
    warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained")
    logging.getLogger("datasets.load").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("`trust_remote_code` is not supported anymore")


# bars may end after the names of this module are gone, so the functions hold what they call
def _display_line(
    bar: Any, msg: str | None = None, pos: int | None = None, display: Any = tqdm.display
) -> bool:
    if bar.fp.isatty():
        return display(bar, msg, pos)
    now = time.monotonic()
    if now - bar.__dict__.setdefault("line_written_at", now + FIRST - SECONDS) >= SECONDS:
        bar.line_written_at = now
        bar.fp.write(bar.format_meter(**{**bar.format_dict, "ncols": 0}) + "\n")  # without the bar
    return True


def _close_silently(bar: Any, close: Any = tqdm.close) -> None:
    if not getattr(bar, "disable", True) and not bar.fp.isatty():
        bar.delay = float("inf")  # tqdm then takes the bar for one that was never displayed
    close(bar)
