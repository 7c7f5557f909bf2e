"""The parser of every subcommand, and the options that several of them share."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from sae_lens_matryoshka.util.suggest import did_you_mean

PROGRAM = "sae-matryoshka"


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class CommandParser(Parser):
    """The parser of a subcommand, which suggests the nearest option for an unknown one."""

    reads_words = False  # everything goes to `words`, for the command to parse
    takes_fields = False  # what is no option goes to `fields`, such as --EVALUATION.FIELD VALUE

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.reads_words:
            return argparse.Namespace(run=self.get_default("run"), words=list(args)), []
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for word in takewhile(lambda word: word != "--", args):
            flag = word.partition("=")[0]
            if not flag.startswith("--") or (self.takes_fields and "." in flag):
                continue
            if not any(option.startswith(flag) for option in options):  # they may be abbreviated
                hint = did_you_mean(flag, options)
                raise ValueError(f"{flag} is not an option of {self.prog}{hint}")
        parsed, others = super().parse_known_args(args, namespace)
        if self.takes_fields:
            parsed.fields, others = others, []
        return parsed, others


def positive_integer(text: str) -> int:
    """The type of options that are counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a positive integer")
    return int(text)


def positive_number(text: str) -> float:
    """The type of options such as a learning rate."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a positive number")
    return number


def names(text: str) -> list[str]:
    """The type of options that list names."""
    return text.split(",")


def add_widths(parser: argparse.ArgumentParser) -> None:
    """The option for level widths."""

    def level_widths(text: str) -> list[int]:
        return [int(width) for width in text.split(",")]

    parser.add_argument(
        "--matryoshka-widths",
        type=level_widths,
        metavar="W,W,…",
        help="level widths, for an SAE whose config has none",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option for the device."""
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The options for loading an SAE, and for the activations to measure its levels on."""
    add_widths(parser)
    parser.add_argument(
        "--activations",
        type=Path,
        metavar="PATH",
        help="a .npy, .pt or .safetensors file of activations (…, d_in), or a folder that SAELens' "
        "CacheActivationsRunner wrote",
    )
    parser.add_argument(
        "--dataset", help="a dataset of texts or tokens, to run through the SAE's model"
    )
    parser.add_argument("--model", help="the model's name, if the SAE's config has none")
    for name, default, text in (
        ("--n-batches", 10, "batches of prompts to run"),
        ("--batch-size-prompts", 16, "prompts in each"),
    ):
        parser.add_argument(
            name,
            type=positive_integer,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    add_device(parser)


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, so that the processes of a command end with it."""

    def stop(signum: int, frame: Any) -> NoReturn:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
