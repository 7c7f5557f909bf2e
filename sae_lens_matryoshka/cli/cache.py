"""`sae-matryoshka cache`: write a model's activations once, to train on them often."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from sae_lens_matryoshka.cli.options import PROGRAM, CommandParser
from sae_lens_matryoshka.cli.train import field_flags

if TYPE_CHECKING:
    from sae_lens_matryoshka.activations.caching import Cache

_USAGE = f"""\
usage: {PROGRAM} cache CONFIG.yaml --out DIR [--dtype NAME] [--rows_per_shard N] [--field value …]

Write the activations that `{PROGRAM} train CONFIG.yaml` would train on, in shards with
checksums. A command that was stopped resumes after the last whole shard.

  --out DIR           a new folder, or one that this command has begun to fill
  --dtype NAME        of the numbers on disk: float16 (default), bfloat16, float32, or int8 with a
                      scale per row
  --rows_per_shard N  about how many rows a shard holds (default: 128 MiB in float16)
  --field value       replaces a field of the config, such as --training_tokens 100_000_000, the
                      number of rows; `{PROGRAM} train --help` shows them all
"""


class _Stopped(KeyboardInterrupt):
    def __init__(self, signum: int):
        self.signum = signum


def add_parser(commands: Any) -> None:
    """Add the command's parser, which leaves all flags to `run`: most are fields of the config."""
    parser: CommandParser = commands.add_parser(
        "cache",
        help="write a model's activations: cache CONFIG.yaml --out DIR [--field value …]",
    )
    parser.reads_words = True
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    words: list[str] = args.words
    if "--help" in words or "-h" in words:
        print(_USAGE, end="")
        return 0
    if not words or words[0].startswith("-"):
        raise ValueError(f"cache needs a config: {PROGRAM} cache CONFIG.yaml --out DIR")
    cache = _open(words[0], field_flags(words[1:]))

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(signum)

    signums = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(signum, stop) for signum in signums]
    try:
        is_complete = cache.write()
    except _Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        command = shlex.join([PROGRAM, "cache", *words])
        print(f"{name}: stopped; {_written(cache)}.\nResume with: {command}", file=sys.stderr)
        return 128 + stopped.signum
    finally:
        for signum, handler in zip(signums, handlers, strict=True):
            signal.signal(signum, handler)
    if not is_complete:
        wanted = cache.cfg.training_tokens
        print(f"The texts end before training_tokens={wanted:,} are reached.", file=sys.stderr)
    print(f"{_written(cache)}.")
    return 0


def _open(config: str, flags: dict[str, list[str]]) -> Cache:
    """The cache that a command describes, checked as far as no model is needed."""
    from sae_lens_matryoshka.runs.config_file import read_config
    from sae_lens_matryoshka.runs.field_names import check_field_names

    values = read_config(config)
    check_field_names(values, flags, options=("out", "dtype", "rows_per_shard", "help"))

    from sae_lens_matryoshka.activations.caching import Cache
    from sae_lens_matryoshka.runs.config import build_run_config, read_words
    from sae_lens_matryoshka.util.hook_names import check_hook_name, short_model_name

    options: dict[str, Any] = {
        name: read_words(name, flags.pop(name), kind)
        for name, kind in (("out", str), ("dtype", str), ("rows_per_shard", int))
        if name in flags
    }
    if "out" not in options:
        raise ValueError("--out is missing: the folder to write to.")
    values |= {"sae.architecture": "standard", "sae.d_sae": 1}
    # of the SAE only its input matters
    kept = "sae.architecture", "sae.d_in", "sae.d_sae"
    cfg = build_run_config(
        {name: value for name, value in values.items() if name in kept or name[:4] != "sae."},
        {name: words for name, words in flags.items() if name == "sae.d_in" or name[:4] != "sae."},
    )
    cache = Cache(cfg, options.pop("out"), **options)
    if cfg.model_class_name == "HookedTransformer":
        with suppress(OSError):  # the config of the model is not on this machine yet
            check_hook_name(cfg.hook_name, cfg.sae.d_in, short_model_name(cfg.model_name), "sae")
    return cache


def _written(cache: Cache) -> str:
    index = cache.index
    return f"{cache.folder} holds {index.n_rows:,} rows in {len(index.shards):,} whole shards"
