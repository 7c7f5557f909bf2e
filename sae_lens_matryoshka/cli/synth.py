"""`sae-matryoshka synth`: SAEs trained where the true features are known."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_matryoshka.cli.options import (
    add_device,
    exit_on_sigterm,
    names,
    positive_integer,
    positive_number,
)

if TYPE_CHECKING:
    from sae_lens_matryoshka.synthetic.models import Benchmark


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "synth",
        help="compare SAEs where the true features are known",
        description="Train SAEs on synthetic activations and score them against the true features. "
        "toy is the tree of the Matryoshka paper, synthsaebench is SynthSAEBench. SAEs that the "
        "folder holds already are not trained again.",
    )
    parser.add_argument("benchmark", choices=["toy", "synthsaebench"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--scale",
        choices=["small", "full"],
        help="of synthsaebench: 2,000 features (small, the default) or 16,384",
    )
    parser.add_argument(
        "--seeds",
        type=seeds,
        default=[0, 1, 2],
        metavar="N|S,S,…",
        help="how many, from 0 on, or which: 3 (default) or 0,3,7; a single one is written 7,",
    )
    parser.add_argument(
        "--variants",
        type=names,
        metavar="V,V,…",
        help="l1, recommended and architectures of SAELens; default: l1,batchtopk,matryoshka for "
        "toy, batchtopk,matryoshka_batchtopk,matryoshka for synthsaebench",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=V,V,…",
        help="values of a field of the matryoshka variant, or of k in every variant; levels=3,5 is "
        "the number of levels; lists are written 5/20; may be repeated, and all are combined",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="vary each field alone, against the defaults, instead of combining them",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="activations to train on")
    parser.add_argument("--lr", type=positive_number, help="learning rate")
    parser.add_argument(
        "--k", type=positive_number, help="mean active latents of the BatchTopK SAEs"
    )
    parser.add_argument(
        "--jobs",
        type=positive_integer,
        metavar="N",
        help="processes (default: one per core, one on a GPU)",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from sae_lens_matryoshka.synthetic.processes import train_all
    from sae_lens_matryoshka.synthetic.randomness import check_seed
    from sae_lens_matryoshka.synthetic.report import write_report
    from sae_lens_matryoshka.synthetic.results import read_results, untrained_variants
    from sae_lens_matryoshka.synthetic.variants import plan_variants
    from sae_lens_matryoshka.util.devices import check_device
    from sae_lens_matryoshka.util.files import check_writable

    out: Path = args.out
    benchmark = _benchmark(args)
    variants = plan_variants(
        benchmark, args.variants or benchmark.variants, args.vary, args.one_at_a_time
    )
    for seed in args.seeds:
        check_seed(seed)
    check_device("device", args.device)
    check_writable("out", out)
    untrained = untrained_variants(benchmark, variants, args.seeds, out, args.device)
    n_jobs = args.jobs or (os.cpu_count() or 1 if args.device == "cpu" else 1)
    exit_on_sigterm()
    try:
        train_all(benchmark, untrained, out, n_jobs=n_jobs, device=args.device)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"\nStopped. {out} has what is finished; the same command resumes.", file=sys.stderr
        )
        raise
    report = write_report(read_results(out), out, [variant.name for variant in variants], benchmark)
    print(f"\n{report.table}\n\n{out} has {', '.join(report.files)}, and the SAEs in runs/.")
    return 0


def _benchmark(args: argparse.Namespace) -> Benchmark:
    from sae_lens_matryoshka.synthetic.models import SYNTHSAEBENCH, TOY

    if args.benchmark == "toy" and args.scale is not None:
        raise ValueError(f"--scale {args.scale} is not accepted: toy has one size.")
    benchmark = TOY if args.benchmark == "toy" else SYNTHSAEBENCH[args.scale or "small"]
    if args.samples is not None and args.samples < benchmark.batch_size:
        raise ValueError(
            f"samples={args.samples} is not accepted: give at least a batch, "
            f"{benchmark.batch_size}."
        )
    options = {"n_samples": args.samples, "lr": args.lr, "k": args.k}
    return replace(benchmark, **{name: v for name, v in options.items() if v is not None})


def seeds(text: str) -> list[int]:
    """The type of --seeds: a list, or how many if there is no comma."""
    parts = text.removesuffix(",").split(",")
    numbers = [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []
    if numbers and "," not in text:
        numbers = list(range(numbers[0]))
    if not numbers or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give how many, such as 10, or which, such as 0,3,7"
        )
    return numbers
