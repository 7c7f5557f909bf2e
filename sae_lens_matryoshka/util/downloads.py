"""Downloads that are verified by checksum, and folders that are written from them."""

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUMS = "SHA256SUMS"


def fetch(out: Path, pattern: str, sha256: str, command: list[str]) -> Path:
    """A file with this checksum, downloaded unless it is there.

    Args:
        out: It is kept in `out / "downloads"`.
        pattern: What its name is like.
        sha256: Its checksum.
        command: Downloads it to the working directory.

    Raises:
        OSError: the command fails, or the file has another checksum.
    """
    downloads = out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for path in downloads.glob(pattern):
        if sha256_of(path) == sha256:
            return path
        path.unlink()  # damaged, or of another version
    with scratch(out) as folder:
        print(shlex.join(command), flush=True)
        run_command(command, folder)
        path = next(folder.glob(pattern), None)
        if path is None:
            raise OSError(f"`{shlex.join(command)}` wrote no {pattern}.")
        if (found := sha256_of(path)) != sha256:
            raise OSError(
                f"{path.name} has the SHA-256 {found}, and {sha256} is expected: the package has "
                "changed, or the download is damaged."
            )
        return path.rename(downloads / path.name)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """An empty folder that is removed afterwards, or by the next run if this one is killed."""
    folder = (out / ".unfinished").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_command(command: list[str], folder: Path | None = None) -> str:
    """The output of a command.

    Raises:
        FileNotFoundError: there is no such command.
        OSError: it fails; the error gives its own words.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines[-1:]
        raise OSError(f"`{shlex.join(command)}` failed: {' '.join(errors)}.")
    return done.stdout


def check_space(out: Path, n_bytes: int) -> None:
    """Check that the disk has room for a step."""
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < n_bytes:
        raise OSError(
            f"the disk of {out} has {free / 1e6:,.0f} MB left, and {n_bytes / 1e6:,.0f} are needed."
        )


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """Write the checksums of a folder's files, as `sha256sum` does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / SUMS).write_text("\n".join(lines) + "\n")


def check_sums(folder: Path) -> None:
    """Check a folder against its checksums; ValueError names the file that differs."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} was not written by this command (no {SUMS}): move it away.")
    for line in (folder / SUMS).read_text().splitlines():
        value, name = line.split("  ", 1)
        if not (folder / name).is_file() or sha256_of(folder / name) != value:
            raise ValueError(f"{folder / name} was changed or is missing: move {folder} away.")
