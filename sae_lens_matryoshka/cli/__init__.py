"""The command `sae-matryoshka`."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig
from simple_parsing import ArgumentGenerationMode, ArgumentParser, NestedMode
from typing_extensions import override

from sae_lens_matryoshka.runs.config import (
    build_run_config,
    field_names,
    merged,
    read_config,
    sae_config_class,
    unknown_field,
)
from sae_lens_matryoshka.runs.dry_run import describe_run
from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner, check_resumable

PROGRAM = "sae-matryoshka"


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _FieldParser(_Parser, ArgumentParser):
    """Makes a flag of each field of a dataclass."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words behind the program's name; those of this process where left out.

    Returns:
        The exit code: 0, 2 for a mistake in the command, the config or a file, 1 where the Hub or
        the disk failed, 130 after SIGINT, 143 after SIGTERM.
    """
    parser = _Parser(
        prog=PROGRAM,
        description="`train CONFIG.yaml [--field value ...]` trains an SAE, `levels DIR` shows the "
        "levels of one, `eval DIR --out RESULTS` runs SAEBench on each of them, `synth toy --out "
        "RESULTS` compares SAEs where the true features are known, `publish DIR REPO_ID` uploads "
        "one, `demo` runs everything on a small model; add --help for more.",
    )
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    try:
        parsed = parser.parse_args(argv)
        planned = _COMMANDS[parsed.command](parsed.arguments)
    except ValueError as error:
        return _refuse(error)
    try:
        return planned()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _refuse(error: Exception, code: int = 2) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _plan_train(words: list[str]) -> Callable[[], int]:
    is_dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    has_config = bool(words) and not words[0].startswith("-")
    config = read_config(words[0]) if has_config else {}
    # Which fields there are depends on the architecture, so it is read first.
    parser = _FieldParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--sae.architecture", dest="architecture")
    architecture, flags = parser.parse_known_args(words[1:] if has_config else words)
    config = merged(config, {"sae": vars(architecture)})
    cfg = build_run_config(merged(config, _overrides(flags, sae_config_class(config))))
    check_resumable(cfg)
    if is_dry:
        plan = describe_run(cfg)
        return lambda: print(plan) or 0
    return partial(_train, cfg, [PROGRAM, "train", *words])


def _train(cfg: LanguageModelSAERunnerConfig[Any], command: list[str]) -> int:
    torch.manual_seed(cfg.seed)  # SAELens has the field and never reads it
    try:
        MatryoshkaTrainingRunner(cfg).run()
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        if stopped.checkpoint is not None:
            command = [*command, "--resume_from_checkpoint", str(stopped.checkpoint)]
            print(f"Go on with: {shlex.join(command)}", file=sys.stderr)
        return 128 + stopped.signum
    if cfg.output_path is not None:
        print(f"The trained SAE is in {cfg.output_path}.")
    return 0


def _overrides(flags: list[str], sae_class: type[TrainingSAEConfig]) -> dict[str, Any]:
    """The fields that the command line sets, in the shape of a config."""
    parser = _FieldParser(
        prog=f"{PROGRAM} train",
        usage="%(prog)s [CONFIG.yaml] [--dry-run] [--sae.architecture NAME] [--field value ...]",
        argument_generation_mode=ArgumentGenerationMode.NESTED,
        nested_mode=NestedMode.WITHOUT_ROOT,
        allow_abbrev=False,
    )
    run_class = make_dataclass(
        "Run",
        [("sae", sae_class)],
        bases=(LanguageModelSAERunnerConfig,),
        namespace={"__doc__": "Every field of a config; what is set here replaces the config's."},
    )
    # Fields that are not given stay out of the result, so the config's own values stand.
    parser.add_arguments(run_class, dest="run", default=argparse.SUPPRESS)  # type: ignore
    parsed, unknown = parser.parse_known_args(flags)
    for word in unknown:
        if word.startswith("--"):
            raise unknown_field(word.removeprefix("--").partition("=")[0], field_names(sae_class))
    if unknown:
        raise ValueError(f"{unknown[0]!r} belongs to no --field; a config comes first.")
    return _with_null(getattr(parsed, "run", {}))


def _with_null(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with `null` read as YAML reads it."""
    return {
        name: _with_null(value) if isinstance(value, dict) else None if value == "null" else value
        for name, value in values.items()
    }


def _plan_demo(words: list[str]) -> Callable[[], int]:
    parser = _Parser(prog=f"{PROGRAM} demo", description="Train and evaluate on a small model.")
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(words)

    from sae_lens_matryoshka.demo.run import run_demo

    return partial(_or_refuse, partial(run_demo, parsed.out, parsed.seed))


def _plan_levels(words: list[str]) -> Callable[[], int]:
    from sae_lens_matryoshka.cli.levels import plan_levels

    return partial(_or_refuse, plan_levels(_Parser(prog=f"{PROGRAM} levels"), words))


def _plan_publish(words: list[str]) -> Callable[[], int]:
    from sae_lens_matryoshka.cli.levels import plan_publish

    return partial(_or_refuse, plan_publish(_Parser(prog=f"{PROGRAM} publish"), words))


def _plan_eval(words: list[str]) -> Callable[[], int]:
    from sae_lens_matryoshka.cli.eval import plan_eval

    return partial(_or_refuse, plan_eval(_Parser(prog=f"{PROGRAM} eval"), words))


def _plan_synth(words: list[str]) -> Callable[[], int]:
    from sae_lens_matryoshka.cli.synth import plan_synth

    return partial(_or_refuse, plan_synth(_Parser(prog=f"{PROGRAM} synth"), words))


def _or_refuse(run: Callable[[], int]) -> int:
    """`run`, whose errors are about what it was given or what it was refused."""
    try:
        return run()
    except ValueError as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(error, code=1)


_COMMANDS = {
    "train": _plan_train,
    "levels": _plan_levels,
    "eval": _plan_eval,
    "synth": _plan_synth,
    "publish": _plan_publish,
    "demo": _plan_demo,
}
