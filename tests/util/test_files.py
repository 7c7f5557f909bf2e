"""Files and folders appear whole or not at all."""

import os
from pathlib import Path

import pytest

from sae_lens_matryoshka.util.files import atomic_file, atomic_folder


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_whole_folder_keeps_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "there"
    for before in ([], [path, path / "old"]):
        if before:
            path.mkdir()
            (path / "old").write_text("old")
        with pytest.raises(error), atomic_folder(path) as unfinished:  # noqa: PT012
            (unfinished / "new").write_text("half")
            raise error
        assert list(tmp_path.rglob("*")) == before


def test_whole_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "there"
    for name in ("first", "second"):
        killed = path.with_name(".there.unfinished")
        killed.mkdir(parents=True)
        (killed / "left behind").touch()
        with atomic_folder(path) as unfinished:
            assert path.exists() == (name == "second")
            (unfinished / name).write_text(name)
        assert [file.name for file in path.iterdir()] == [name]
        assert list(path.parent.iterdir()) == [path]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("real")
    for text in ("first", "second"):
        with atomic_folder(link) as unfinished:
            (unfinished / "file").write_text(text)
        assert (tmp_path / "real" / "file").read_text() == text
    (tmp_path / "target").write_text("old")
    (tmp_path / "to_file").symlink_to("target")
    with atomic_file(tmp_path / "to_file") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(pipe)
    with atomic_file(pipe) as unfinished:
        assert unfinished == pipe
    assert link.is_symlink()
    assert (tmp_path / "to_file").is_symlink()
    assert pipe.is_fifo()
    assert len(list(tmp_path.iterdir())) == 5
