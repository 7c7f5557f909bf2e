"""Progress bars in a file and on a terminal, and which words of libraries are left out."""

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import warnings

import pytest

from sae_lens_matryoshka.util.output import tidy_output

SCRIPT = """
from itertools import count
from types import SimpleNamespace
from sae_lens_matryoshka.util import output
from tqdm import tqdm
from tqdm.auto import trange

clock = count(step={step})
output.time = SimpleNamespace(monotonic=lambda: next(clock))
output.tidy_output()
with tqdm(desc="Outer", total=4, mininterval=1000) as bar:
    for i in trange(4, desc="Inner", leave=False, mininterval=0):
        bar.set_description(f"Outer, at {{i}}")  # SAELens' trainer redraws its bar with this
        bar.update()
print("done")
"""


def command(step: float) -> list[str]:
    """A process whose clock goes on by `step` seconds whenever a bar is redrawn."""
    return [sys.executable, "-c", SCRIPT.format(step=step)]


def test_short_bars_leave_nothing_in_a_file() -> None:
    done = subprocess.run(command(step=0.5), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_long_bars_leave_a_line_now_and_then() -> None:
    done = subprocess.run(command(step=25), capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    lines = [line.partition("/4 [00:00<")[0] for line in done.stderr.splitlines()]
    assert lines == ["Outer, at 0:   0% 0", "Inner:  25% 1", "Outer, at 2:  50% 2", "Inner:  75% 3"]


def test_a_terminal_shows_bars() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run(command(step=1), stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "Inner:  50%|█" in shown
    assert "Outer, at 3: 100%|█" in shown


def test_other_words_of_libraries_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tidy_output()
        for text in ("\nThis SAE has non-empty model_from_pretrained_kwargs. \n…", "Look out"):
            warnings.warn(text, stacklevel=1)
    assert [str(warning.message) for warning in warned] == ["Look out"]
    logger = logging.getLogger("datasets.load")
    with caplog.at_level("ERROR", "datasets.load"):
        for text in ("`trust_remote_code` is not supported anymore.\n…", "Look out"):
            logger.error(text)
    assert caplog.messages == ["Look out"]
