"""The parser of every subcommand, and the options that several of them share."""

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
    """The parser of a subcommand, which suggests similar options for an unknown one."""

    reads_words = False  # everything goes to `words`, for the command to parse
    takes_fields = False  # other options go to `fields`, such as --EVALUATION.FIELD VALUE

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
                hint = did_you_mean(flag, options, cutoff=0.75)  # all begin with --
                raise ValueError(f"{flag} is not an option of {self.prog}{hint}")
        parsed, others = super().parse_known_args(args, namespace or argparse.Namespace())
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


def level_widths(text: str) -> list[int]:
    """The type of --matryoshka-widths."""
    return [int(width) for width in text.split(",")]


def add_widths(parser: argparse.ArgumentParser) -> None:
    """Add the option for level widths."""
    parser.add_argument(
        "--matryoshka-widths",
        type=level_widths,
        metavar="W,W,…",
        help="level widths, for an SAE whose config has none",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option for the device."""
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading an SAE, and for the activations to look at."""
    add_widths(parser)
    add = parser.add_argument
    add(
        "--activations",
        type=Path,
        metavar="PATH",
        help="a .npy, .pt or .safetensors file of activations (…, d_in), or a folder of shards: "
        "docs/activations.md",
    )
    add("--dataset", help="a dataset of texts or tokens, to run through the SAE's model")
    add("--model", help="the model's name, if the SAE's config has none")
    add(
        "--batch-size-prompts",
        type=positive_integer,
        default=16,
        metavar="N",
        help="prompts that the model runs at a time (default: %(default)s)",
    )
    add_device(parser)


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_data`, and how many batches to measure levels on."""
    add_data(parser)
    parser.add_argument(
        "--n-batches",
        type=positive_integer,
        default=10,
        metavar="N",
        help="batches of prompts to run (default: %(default)s)",
    )
    parser.add_argument(
        "--no-ce-loss",
        action="store_true",
        help="with --dataset, leave out the CE loss, which runs the whole model once for each "
        "level and twice more",
    )


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, so that the processes of a command end with it."""

    def stop(signum: int, frame: Any) -> NoReturn:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
