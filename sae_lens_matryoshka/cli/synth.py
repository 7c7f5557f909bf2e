"""`sae-matryoshka synth`: SAEs trained where the true features are known."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.cli.options import (
    add_device,
    exit_on_sigterm,
    names,
    positive_integer,
    positive_number,
)


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "synth",
        help="compare SAEs where the true features are known",
        description="Train SAEs on synthetic activations and score them against the true features. "
        "toy is the tree of the Matryoshka paper, synthsaebench is SynthSAEBench, of 2,000 "
        "(small) or 16,384 features (full), hard a world in which latents fire together for many "
        "reasons. SAEs already in the folder are not trained again.",
    )
    parser.add_argument("benchmark", choices=["toy", "synthsaebench", "hard"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--scale", choices=["small", "full"], help="synthsaebench's (default: small)"
    )
    parser.add_argument(
        "--seeds",
        type=seeds,
        default=[0, 1, 2],
        metavar="N|S,S,…",
        help="how many, from 0 on, or which: 3 (default) or 0,3,7; a single seed needs a trailing "
        "comma: 7,",
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
        "--one-at-a-time", action="store_true", help="vary each field alone, against the defaults"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="activations to train on")
    parser.add_argument("--lr", type=positive_number, help="learning rate")
    parser.add_argument("--k", type=positive_number, help="mean L0 of the BatchTopK SAEs")
    parser.add_argument(
        "--tree",
        action="store_true",
        help="also build the tree of each SAE, and compare it with the true hierarchy",
    )
    parser.add_argument(
        "--jobs", type=positive_integer, metavar="N", help="processes (default: cores; 1 on a GPU)"
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from sae_lens_matryoshka.synthetic.hard import HARD
    from sae_lens_matryoshka.synthetic.models import SYNTHSAEBENCH, TOY
    from sae_lens_matryoshka.synthetic.randomness import MAX_SEED
    from sae_lens_matryoshka.synthetic.report import write_report
    from sae_lens_matryoshka.synthetic.results import read_results, untrained_variants
    from sae_lens_matryoshka.synthetic.training import train_all
    from sae_lens_matryoshka.synthetic.variants import plan_variants
    from sae_lens_matryoshka.util.checks import checked_number
    from sae_lens_matryoshka.util.devices import check_device
    from sae_lens_matryoshka.util.files import check_writable

    one_size = {"toy": TOY, "hard": HARD}
    if args.benchmark in one_size and args.scale is not None:
        raise ValueError(f"--scale {args.scale} is not accepted: {args.benchmark} has one size.")
    benchmark = one_size.get(args.benchmark) or SYNTHSAEBENCH[args.scale or "small"]
    given = {"n_samples": args.samples, "lr": args.lr, "k": args.k}
    benchmark = replace(benchmark, **{k: value for k, value in given.items() if value is not None})
    batch = benchmark.batch_size
    checked_number("samples", benchmark.n_samples, f"at least a batch, {batch}", least=batch)
    for seed in args.seeds:
        checked_number("seed", seed, f"0 to {MAX_SEED}", most=MAX_SEED)
    variant_names = args.variants or benchmark.variants
    variants = plan_variants(benchmark, variant_names, args.vary, args.one_at_a_time)
    check_device("device", args.device)
    out: Path = args.out
    check_writable("out", out)
    untrained = untrained_variants(benchmark, variants, args.seeds, out, args.device)
    n_jobs = args.jobs or (os.cpu_count() or 1 if args.device == "cpu" else 1)
    exit_on_sigterm()
    try:
        train_all(benchmark, untrained, out, n_jobs=n_jobs, device=args.device)
    except (KeyboardInterrupt, SystemExit):
        stopped = f"\nStopped. {out} has the finished SAEs; the same command resumes."
        print(stopped, file=sys.stderr)
        raise
    order = [variant.name for variant in variants]
    results = read_results(out)
    files = write_report(results, out, order, benchmark)
    print(f"\n{(out / files[0]).read_text()}")
    if args.tree:
        from sae_lens_matryoshka.synthetic.tree_report import write_tree_report
        from sae_lens_matryoshka.synthetic.trees import score_trees

        tree_files = write_tree_report(score_trees(benchmark, results, out, args.device), out)
        files += tree_files
        print((out / tree_files[0]).read_text())
    print(f"{out} has {', '.join(files)}, and the SAEs in runs/.")
    return 0


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
