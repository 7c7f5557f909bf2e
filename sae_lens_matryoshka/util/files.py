"""Files and folders that appear under their names only once they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which replaces `path` if the block ends without an error.

    Until then, and if the block fails, `path` stays as it was.
    """
    path = path.resolve()  # of a link the target is replaced, and the link stays
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
    """As `atomic_folder`, for a file: a path to write to, with the suffix of `path`."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe, which can't be replaced
        yield path
        return
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(name: str, path: Path) -> None:
    """Check that `path` is a writable folder, or can be made.

    Raises:
        ValueError: it isn't; the error calls it `name`.
    """
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{name}={str(path)!r} can't be written to: {existing} is not a writable folder."
        )
