"""Files and folders that appear under their name only when they are whole, or can at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` when the block ends without an error.

    What was at `path` before stays there until then, and for good where the block fails.
    """
    path = path.resolve()  # behind a link, what it leads to is replaced, and the link stays
    unfinished = path.with_name(f".{path.name}.unfinished")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        unfinished.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """As `atomic_folder`, of a file: a path to write to, with the suffix of `path`."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe, which nothing may replace
        yield path
        return
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(name: str, path: Path) -> None:
    """Check that a folder can be made at `path`, or written to.

    Raises:
        ValueError: it can't; the sentence calls it `name`.
    """
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{name}={str(path)!r} can't be written to: {existing} does not let.")
