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

    from sae_lens_matryoshka.activations.shards import Activations


def add_parser(commands: Any) -> None:
    """Add the command's parser, which leaves all flags to `run`: the fields of the config."""
    parser: CommandParser = commands.add_parser(
        "train",
        help="train an SAE: train [CONFIG.yaml] [--activations PATH] [--dry-run] [--field value …]",
    )
    parser.reads_words = True
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from sae_lens_matryoshka.runs.config import build_run_config, read_config, sae_config_class
    from sae_lens_matryoshka.runs.dry_run import describe_run
    from sae_lens_matryoshka.runs.from_activations import batches_for
    from sae_lens_matryoshka.runs.runner import check_resumable

    words = [word for word in args.words if word not in ("--dry-run", "--help", "-h")]
    has_config = bool(words) and not words[0].startswith("-")
    values = read_config(words[0]) if has_config else {}
    flags = field_flags(words[has_config:])
    if not has_config and any(word.endswith((".yaml", ".yml")) for word in words):
        raise ValueError("the config comes first, before the flags.")
    if "sae.architecture" in flags:
        values["sae.architecture"] = " ".join(flags.pop("sae.architecture"))
    if "--help" in args.words or "-h" in args.words:
        _print_help(sae_config_class(values))
        return 0
    activations = _open_activations(flags.pop("activations", None))
    if activations is not None:
        values.setdefault("sae.d_in", activations.d_in)
    cfg = build_run_config(values, flags)
    check_resumable(cfg)
    if activations is not None:
        batches_for(cfg, activations)  # raises if they don't fit
    if "--dry-run" in args.words:
        print(describe_run(cfg, activations))
        return 0
    return _train(cfg, [PROGRAM, "train", *words], activations)


def _open_activations(words: Sequence[str] | None) -> Activations | None:
    """Those in the path after --activations, if it is given."""
    from sae_lens_matryoshka.activations.shards import open_activations

    if words is None:
        return None
    if len(words) != 1:
        raise ValueError("--activations takes one path, of a file or a folder.")
    return open_activations(words[0])


def field_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """The words after each `--field`; the last ones of a field that is given twice."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name] = [value] if equals else []
        elif values is None:
            raise ValueError(f"{word!r} belongs to no --field; a config comes first.")
        else:
            values.append(word)
    return flags


def _train(
    cfg: LanguageModelSAERunnerConfig[Any], command: list[str], activations: Activations | None
) -> int:
    # PyTorch asks Linux for huge pages: each step allocates its gradients anew, and 4 KB at a time
    # that took a quarter of a step
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
    from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

    torch.manual_seed(cfg.seed)  # SAELens does not use cfg.seed
    try:
        MatryoshkaTrainingRunner(cfg, activations=activations).run()
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
        usage="%(prog)s [CONFIG.yaml] [--activations PATH] [--dry-run] [--sae.architecture NAME] "
        "[--field value ...]",
        description="Train an SAE. Flags replace fields of the config; lists are written 1 2 3. "
        "--activations trains on a file or a folder of activations and loads no model; "
        "--dry-run only checks names, widths and paths.",
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.NESTED,
        nested_mode=simple_parsing.NestedMode.WITHOUT_ROOT,
    )
    run_class = make_dataclass("Run", [("sae", sae_class)], bases=(LanguageModelSAERunnerConfig,))
    run_class.__doc__ = "Every field of a config."
    parser.add_arguments(run_class, dest="run")
    parser.print_help()
