"""`sae-matryoshka train`: a training run from a YAML file, flags, or both."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

from sae_lens_matryoshka.cli.options import PROGRAM, CommandParser

if TYPE_CHECKING:
    from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig

    from sae_lens_matryoshka.runs.varying import Sweep


def add_parser(commands: Any) -> None:
    """Add the command's parser, which leaves all flags to `run`: the fields of the config."""
    parser: CommandParser = commands.add_parser(
        "train",
        help="train SAEs: train [CONFIG.yaml] [--dry-run] [--field value ...] [--vary FIELD=V,V,…]",
    )
    parser.reads_words = True
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from sae_lens_matryoshka.runs.config_file import read_config
    from sae_lens_matryoshka.runs.field_names import check_field_names

    words = [word for word in args.words if word not in ("--dry-run", "--help", "-h")]
    has_config = bool(words) and not words[0].startswith("-")
    values = read_config(words[0]) if has_config else {}
    flags = _flags(words[has_config:])
    vary = flags.pop("vary", None)
    if not has_config and any(word.endswith((".yaml", ".yml")) for word in words):
        raise ValueError("the config comes first, before the flags.")
    if "sae.architecture" in flags:
        values["sae.architecture"] = " ".join(flags.pop("sae.architecture"))
    wants_help = "--help" in args.words or "-h" in args.words
    if not wants_help:
        check_field_names(values, flags, options=("dry-run", "help"))

    from sae_lens_matryoshka.runs.config import build_run_config, sae_config_class
    from sae_lens_matryoshka.runs.dry_run import describe_run
    from sae_lens_matryoshka.runs.runner import check_resumable

    if wants_help:
        _print_help(sae_config_class(values))
        return 0
    is_dry_run = "--dry-run" in args.words
    command = [PROGRAM, "train", *words]
    if vary is not None:
        return _sweep(values, flags, vary, is_dry_run, command)
    cfg = build_run_config(values, flags)
    check_resumable(cfg)
    if is_dry_run:
        print(describe_run(cfg))
        return 0
    return _train(cfg, command)


def _sweep(
    values: dict[str, Any],
    flags: dict[str, list[str]],
    vary: list[str],
    is_dry_run: bool,
    command: list[str],
) -> int:
    from sae_lens_matryoshka.runs.dry_run import describe_sweep
    from sae_lens_matryoshka.runs.sweep import check_sweep
    from sae_lens_matryoshka.runs.varying import plan_sweep

    sweep = plan_sweep(values, flags, vary)
    check_sweep(sweep.cfgs)
    if is_dry_run:
        print(describe_sweep(sweep))
        return 0
    return _train(sweep.cfg, command, sweep)


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    """The words after each `--field`; the last ones of a field that is given twice, all of vary."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            before = flags.get(name, []) if name == "vary" else []
            values = flags[name] = [*before, value] if equals else before
        elif values is None:
            raise ValueError(f"{word!r} belongs to no --field; a config comes first.")
        else:
            values.append(word)
    return flags


def _train(
    cfg: LanguageModelSAERunnerConfig[Any], command: list[str], sweep: Sweep | None = None
) -> int:
    # PyTorch asks Linux for huge pages: each step allocates its gradients anew, and 4 KB at a time
    # that took a quarter of a step
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from sae_lens_matryoshka.cli.sweep import train_and_compare
    from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
    from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

    torch.manual_seed(cfg.seed)  # SAELens does not use cfg.seed
    try:
        runner = MatryoshkaTrainingRunner(cfg)
        if sweep is not None:
            return train_and_compare(runner, sweep.cfgs)
        runner.run()
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        if stopped.checkpoint is not None:
            command = [*command, "--resume_from_checkpoint", str(stopped.checkpoint)]
            print(f"Resume with: {shlex.join(command)}", file=sys.stderr)
        return 128 + stopped.signum
    except Exception:  # one line would not explain what went wrong in a training
        traceback.print_exc()
        return 1
    if cfg.output_path is not None:
        print(f"The trained SAE is in {cfg.output_path}.")
    return 0


def _print_help(sae_class: type[TrainingSAEConfig]) -> None:
    """Print every field with its type, its default and its description."""
    import simple_parsing
    from sae_lens import LanguageModelSAERunnerConfig

    parser = simple_parsing.ArgumentParser(
        prog=f"{PROGRAM} train",
        usage="%(prog)s [CONFIG.yaml] [--dry-run] [--sae.architecture NAME] [--field value ...] "
        "[--vary FIELD=V,V,… ...]",
        description="Train an SAE. Flags replace fields of the config; lists are written 1 2 3. "
        "--dry-run only checks names, widths and paths. --vary trains an SAE for each value on the "
        "same activations, for all combinations if it is repeated: of fields of sae, and of seed, "
        "that of the initial weights; lists are written 1/2/3.",
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.NESTED,
        nested_mode=simple_parsing.NestedMode.WITHOUT_ROOT,
    )
    run_class = make_dataclass("Run", [("sae", sae_class)], bases=(LanguageModelSAERunnerConfig,))
    run_class.__doc__ = "Every field of a config."
    parser.add_arguments(run_class, dest="run")
    parser.print_help()
