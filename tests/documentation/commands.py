"""Checks commands of the documentation with the parsers that would read them, and runs none."""

import argparse
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed.run import get_args_parser

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.activations.caching import Cache

ROOT = Path(__file__).parents[2]
_SEPARATORS = set("();|&\n")
_ASSIGNMENT = re.compile(r"\w+=")


class Parsed(BaseException):
    """Ends a program once its arguments are parsed."""


def check(block: str) -> None:
    """Check each command of a shell block; AssertionError or the parser's error if one is wrong.

    A block none of whose lines begins with a program of `_CHECKS` is text, such as a formula.
    """
    if not re.search(rf"^(\w+=\S* )*(\S*/)?({'|'.join(_CHECKS)}) ", block, re.MULTILINE):
        return
    folder = Path.cwd()
    try:
        for program, *words in commands(block):
            name = program.rpartition("/")[2]
            assert name in _CHECKS, f"{program} is not a program that this test can check"
            _CHECKS[name](words)
    finally:
        os.chdir(folder)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; those of a loop with its first value."""
    block = re.sub(r"(?<!\S)#.*", "", block.replace("\\\n", " "))
    for variable, value in re.findall(r"^ *for (\w+) in (\S+)", block, re.MULTILINE):
        block = block.replace(f"${variable}", value)
    lexer = shlex.shlex(block, posix=True, punctuation_chars="".join(_SEPARATORS))
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= _SEPARATORS:
            if words and words[0] not in ("for", "done", "export"):
                yield words
            words = []
        elif words or not (word == "do" or _ASSIGNMENT.match(word)):
            words.append(word)


def _sae_matryoshka(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", _parse_and_stop)
        with pytest.raises(Parsed):
            cli.main(words)
    if words[0] == "train":
        if "--resume_from_checkpoint" in words:  # of a run of the reader's
            i = words.index("--resume_from_checkpoint")
            words = words[:i] + words[i + 2 :]
        with pytest.MonkeyPatch.context() as patch:  # a dry run keeps its process off the Hub
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            assert cli.main([*words, "--dry-run"]) == 0
    if words[0] == "cache":  # into a folder that no other command of the page reads
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cache, "write", _stop)
            with pytest.raises(Parsed):
                cli.main([*words, "--out", "a_new_folder"])


def _torchrun(words: list[str]) -> None:
    args = get_args_parser().parse_args(words)
    assert args.module
    assert args.training_script == "sae_lens_matryoshka"
    _sae_matryoshka(args.training_script_args)


def _python(words: list[str]) -> None:
    option, *others = words
    if option == "-c":
        compile(others[0], "-c", "exec")
    elif option == "-m" and others[0] == "sae_lens_matryoshka":
        _sae_matryoshka(others[1:])
    elif option == "-m" and others[0] == "pytest":
        _pytest(others[1:])
    elif option == "-m":
        _script(lambda: runpy.run_module(others[0], run_name="__main__"), others)
    else:
        _script(lambda: runpy.run_path(option, run_name="__main__"), words, Path(option).parent)


def _script(start: Callable[[], Any], argv: list[str], folder: Path = ROOT) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", _parse_and_stop)
        patch.setattr(sys, "argv", argv)
        patch.syspath_prepend(folder.resolve())
        with pytest.raises(Parsed):
            start()


def _pytest(words: list[str]) -> None:
    for word in words:
        assert "/" not in word or Path(word).exists(), f"{word} is missing"


def _make(words: list[str]) -> None:
    makefile = Path("Makefile").read_text()
    for word in words:
        assert "=" in word or re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), word


def _pip(words: list[str]) -> None:
    extras = metadata("sae-lens-matryoshka").get_all("Provides-Extra") or []
    for word in words:
        if found := re.fullmatch(r"(?:sae-lens-matryoshka|\.)\[(.+)\]", word):
            assert set(found[1].split(",")) <= set(extras), word


def _cd(words: list[str]) -> None:
    os.chdir(words[0])


def _parse_and_stop(parser: Any, args: Any = None, namespace: Any = None) -> NoReturn:
    _, unknown = parser.parse_known_args(sys.argv[1:] if args is None else args, namespace)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed


def _stop(*args: Any) -> NoReturn:
    raise Parsed


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "sae-matryoshka": _sae_matryoshka,
    "torchrun": _torchrun,
    "python": _python,
    "python3": _python,
    "make": _make,
    "pip": _pip,
    "cd": _cd,
    ".": lambda words: None,  # activates an environment
    "git": lambda words: None,
}
