"""What the commands answer to a mistake."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sae_lens_matryoshka import cli

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line that the command line answers, behind the traces of a progress bar."""

    def run(*words: str | Path, code: int = 2) -> str:
        capsys.readouterr()  # what was written before the command
        assert cli.main([str(word) for word in words]) == code
        line = capsys.readouterr().err.rpartition("\r")[2]
        assert line.startswith("error: ")
        assert line.endswith("\n")
        assert line.count("\n") == 1
        return line

    return run


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` sets this for its process, which here is that of all tests."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
