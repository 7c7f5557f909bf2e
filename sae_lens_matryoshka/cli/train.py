"""`sae-matryoshka train`: a training run from a YAML file, flags, or both."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

from sae_lens_matryoshka.cli.options import PROGRAM, CommandParser

if TYPE_CHECKING:
    from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig

    from sae_lens_matryoshka.runs.varying import Sweep

# besides the fields of the config
_OPTIONS = ("activations", "vary", "process-timeout", "shard-moments")


def add_parser(commands: Any) -> None:
    """Add the command's parser, which leaves all flags to `run`: the fields of the config."""
    parser: CommandParser = commands.add_parser(
        "train",
        help="train SAEs: train [CONFIG.yaml] [--activations PATH] [--dry-run] [--field value …]",
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
    flags = field_flags(words[has_config:])
    own = {name: flags.pop(name, None) for name in _OPTIONS}
    if not has_config and any(word.endswith((".yaml", ".yml")) for word in words):
        raise ValueError("the config comes first, before the flags.")
    if "sae.architecture" in flags:
        values["sae.architecture"] = " ".join(flags.pop("sae.architecture"))
    wants_help = "--help" in args.words or "-h" in args.words
    has_several = any("architecture" in text for text in own["vary"] or ())  # with other fields
    if not wants_help and not has_several:
        check_field_names(values, flags, options=("dry-run", "help", *_OPTIONS))

    from sae_lens_matryoshka.activations.shards import open_activations
    from sae_lens_matryoshka.runs.config import build_run_config, read_words, sae_config_class
    from sae_lens_matryoshka.runs.dry_run import describe_run, describe_sweep
    from sae_lens_matryoshka.runs.from_activations import batches_for
    from sae_lens_matryoshka.runs.processes import DEFAULT_TIMEOUT
    from sae_lens_matryoshka.runs.runner import check_resumable
    from sae_lens_matryoshka.runs.sweep import check_sweep
    from sae_lens_matryoshka.runs.varying import plan_sweep

    if wants_help:
        _print_help(sae_config_class(values))
        return 0
    seconds = own["process-timeout"]
    timeout = None if seconds is None else read_words("process-timeout", seconds, float)
    options: dict[str, Any] = {
        "process_timeout": DEFAULT_TIMEOUT if timeout is None else timeout,
        "shard_moments": own["shard-moments"] is not None,
    }
    if own["shard-moments"]:
        raise ValueError("--shard-moments takes no value.")
    if own["vary"] is not None and (timeout is not None or options["shard_moments"]):
        raise ValueError("--vary trains on one process: give no option of several with it.")
    paths, activations = own["activations"], None
    if paths is not None:
        if len(paths) != 1:
            raise ValueError("--activations takes one path, of a file or a folder.")
        activations = open_activations(paths[0])
        values.setdefault("sae.d_in", activations.d_in)
        options["activations"] = activations
    sweep = None
    if own["vary"] is None:
        cfg = build_run_config(values, flags)
        check_resumable(cfg, from_activations=activations is not None)
    else:
        sweep = plan_sweep(values, flags, own["vary"])
        check_sweep(sweep.cfgs)
        cfg = sweep.cfg
    if activations is not None:
        batches_for(cfg, activations)  # raises if they don't fit
    if "--dry-run" in args.words:
        described = describe_sweep(sweep, activations) if sweep else describe_run(cfg, activations)
        print(described)
        return 0
    return _train(cfg, sweep, options, [PROGRAM, "train", *words])


def field_flags(words: Sequence[str]) -> dict[str, list[str]]:
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
    cfg: LanguageModelSAERunnerConfig[Any],
    sweep: Sweep | None,
    options: Mapping[str, Any],
    command: list[str],
) -> int:
    import torch

    from sae_lens_matryoshka.cli.sweep import train_and_compare
    from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
    from sae_lens_matryoshka.runs.processes import ProcessFailed
    from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

    torch.manual_seed(cfg.seed)  # SAELens does not use cfg.seed
    runner, is_first = None, True
    try:
        runner = MatryoshkaTrainingRunner(cfg, **options)
        is_first = runner.processes is None or runner.processes.rank == 0
        if sweep is not None:
            return train_and_compare(runner, sweep.cfgs)
        runner.run()
    except TrainingInterrupted as stopped:
        if is_first:
            print(stopped, file=sys.stderr)
            if runner is not None and runner.processes is not None:
                n = str(runner.processes.n)
                torchrun = ["torchrun", "--standalone", "--nproc-per-node", n, "-m"]
                command = [*torchrun, "sae_lens_matryoshka", *command[1:]]
            if stopped.checkpoint is not None:
                command = [*command, "--resume_from_checkpoint", str(stopped.checkpoint)]
                print(f"Resume with: {shlex.join(command)}", file=sys.stderr)
        return 128 + stopped.signum
    except ProcessFailed as failed:  # which prints a traceback of its own
        print(f"error: {failed}", file=sys.stderr)
        return 1
    except Exception as error:
        if runner is None and isinstance(error, ValueError):
            raise  # the config asks for what can't be done
        traceback.print_exc()  # one line would not explain what went wrong in a training
        return 1
    if cfg.output_path is not None and is_first:
        print(f"The trained SAE is in {cfg.output_path}.")
        words = [PROGRAM, "levels", str(cfg.output_path)]
        if "activations" in options:
            words += ["--activations", options["activations"].name]
        print(f"Its levels: {shlex.join(words)}")
    return 0


def _print_help(sae_class: type[TrainingSAEConfig]) -> None:
    """Print every field with its type, its default and its description."""
    import simple_parsing
    from sae_lens import LanguageModelSAERunnerConfig

    parser = simple_parsing.ArgumentParser(
        prog=f"{PROGRAM} train",
        usage="%(prog)s [CONFIG.yaml] [--activations PATH] [--vary FIELD=V,V,…] [--dry-run] "
        "[--process-timeout SECONDS] [--shard-moments] [--sae.architecture NAME] "
        "[--field value ...]",
        description="Train an SAE. Flags replace fields of the config; lists are written 1 2 3. "
        "--activations trains on a file or a folder of activations and loads no model. --vary "
        "trains an SAE for each value on the same activations, for all combinations if it is "
        "repeated: of fields of sae, and of seed, that of the initial weights; lists are written "
        "1/2/3. --dry-run only checks names, widths and paths. Started by torchrun, several "
        "processes train one SAE; --process-timeout is how long one waits for the others, and with "
        "--shard-moments each keeps its part of Adam's moments.",
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.NESTED,
        nested_mode=simple_parsing.NestedMode.WITHOUT_ROOT,
    )
    run_class = make_dataclass("Run", [("sae", sae_class)], bases=(LanguageModelSAERunnerConfig,))
    run_class.__doc__ = "Every field of a config."
    parser.add_arguments(run_class, dest="run")
    parser.print_help()
