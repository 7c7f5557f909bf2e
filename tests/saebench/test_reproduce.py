"""Every command of docs/reproduce.md, as a dry run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_lens_matryoshka import cli

REPOSITORY = Path(__file__).parents[2]


def commands() -> Iterator[list[str]]:
    """The words of each command, with loops over k written out."""
    text = (REPOSITORY / "docs" / "reproduce.md").read_text()
    for block in re.findall(r"^```\n(.*?)^```", text, re.S | re.M):
        lines = block.replace("\\\n", " ")
        for values, body in re.findall(r"for k in ([\d ]+); do\n(.*?)done", lines, re.S):
            for k in values.split():
                yield from map(shlex.split, body.replace("$k", k).strip().splitlines())
        outside = re.sub(r"for k in .*?done\n", "", lines, flags=re.S)
        yield from map(shlex.split, outside.strip().splitlines())


COMMANDS = list(commands())


def test_there_are_all_of_them() -> None:
    trained = [words[words.index("--output_path") + 1] for words in COMMANDS if words[1] == "train"]
    assert trained == [
        *(f"output/gemma-2-2b/k{k}" for k in (20, 40, 80, 160, 320)),
        "output/gemma-2-2b-19/k80",
        *(f"output/pythia-160m/k{k}" for k in (20, 40, 80, 160, 320)),
    ]
    evaluated = [word for words in COMMANDS if words[1] == "eval" for word in words]
    assert set(trained) <= set(evaluated), "what is trained is evaluated"
    assert [words[1] for words in COMMANDS].count("eval") == 4


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:5]))
def test_dry_run(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert words[0] == "sae-matryoshka"
    assert cli.main([*words[1:], "--dry-run"]) == 0
    told = capsys.readouterr().out
    if words[1] == "train":
        assert "244,140 steps of 2,048 tokens" in told
        assert "levels of 2048, 6144, 14336, 30720, 65536" in told or "levels of 512, 1536" in told
    else:
        assert "not downloaded" in told
        assert "Would run absorption" in told or "Would run core" in told
