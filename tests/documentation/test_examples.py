"""Every Python block of README.md and docs/ runs; every command is read by its own parser."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAETrainingRunner
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from tests.documentation import commands, stand_ins
from tests.documentation.stand_ins import ROOT
from tests.loopback_hub import LoopbackHub

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def check_commands(example: Example) -> None:
    commands.check(example.parsed)


EVALUATORS: dict[str, Callable[[Example], Any] | None] = {
    "python": PythonEvaluator(),
    **dict.fromkeys(("", "sh", "bash"), check_commands),
    **dict.fromkeys(("text", "yaml", "json", "bibtex")),
}


def blocks(document: Document) -> Iterator[Region]:
    for region in RawFencedCodeBlockLexer(re.compile(r" *(?P<language>\w*).*$\n", re.M))(document):
        evaluator = EVALUATORS[region.lexemes["language"]]
        yield Region(region.start, region.end, region.lexemes["source"], evaluator)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("names")
    stand_ins.fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return stand_ins.names(folder)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The variables that commands and examples set end with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_page(
    page: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(LanguageModelSAETrainingRunner, "__init__", stand_ins.start_small)
    document = Sybil([blocks]).parse(page)
    examples = list(document.examples())
    if not examples:
        return
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    stand_ins.fill(folder)
    if "```python" in document.text:
        (tmp_path / "published").mkdir()
        for repository, files in stand_ins.published(tmp_path / "published").items():
            hub.add(repository, files)
        document.namespace.update(request.getfixturevalue("names"))
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("sae-matryoshka levels DIR --datset NAME", "--datset is not an option"),
        ("sae-matryoshka train configs/gpt2-small.yaml --sae.kk 32", "kk"),
        ("sae-matryoshka train configs/none.yaml", "none.yaml"),
        ("pip install 'sae-lens-matryoshka[all]'", "all"),
        ("python benchmarks/step_time.py --rnds 7", "--rnds"),
        ("make demos", "demos"),
    ],
)
def test_wrong_commands_are_found(
    block: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)) as caught:
        commands.check(block)
    assert error in f"{caught.value} {capsys.readouterr().err}"


def test_commands_of_a_block() -> None:
    block = """
    cd demo_run && HF_HUB_OFFLINE=1 ../.venv/bin/sae-matryoshka levels DIR  # measured
    for k in 20 40; do
      sae-matryoshka train CONFIG.yaml --sae.k $k \\
        --output_path out/k$k
    done
    """
    assert list(commands.commands(block)) == [
        ["cd", "demo_run"],
        ["../.venv/bin/sae-matryoshka", "levels", "DIR"],
        ["sae-matryoshka", "train", "CONFIG.yaml", "--sae.k", "20", "--output_path", "out/k20"],
    ]
