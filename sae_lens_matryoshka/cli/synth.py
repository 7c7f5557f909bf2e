"""The command `synth`, which trains SAEs where the true features are known."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from sae_lens_matryoshka.synthetic.models import SYNTHSAEBENCH, TOY, Benchmark
from sae_lens_matryoshka.synthetic.processes import train_all
from sae_lens_matryoshka.synthetic.randomness import check_seed
from sae_lens_matryoshka.synthetic.report import write_report
from sae_lens_matryoshka.synthetic.runs import missing, read_runs
from sae_lens_matryoshka.synthetic.variants import Variant, plan_variants
from sae_lens_matryoshka.util.files import check_writable


def plan_synth(parser: argparse.ArgumentParser, words: list[str]) -> Callable[[], int]:
    """`synth BENCHMARK --out DIR`: train variants over seeds, and score them on the truth."""
    parser.description = (
        "Train SAEs on synthetic activations and score them against the true features. toy is the "
        "tree of the Matryoshka paper, synthsaebench is SynthSAEBench. What a folder holds already "
        "is not trained again."
    )
    parser.add_argument("benchmark", choices=["toy", "synthsaebench"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--scale",
        choices=list(SYNTHSAEBENCH),
        help="of synthsaebench: 2,000 features (small, the default) or 16,384",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default=[0, 1, 2],
        metavar="N|S,S,…",
        help="how many, from 0 on, or which: 3 (default) or 0,3,7; one alone is written 7,",
    )
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
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
        "the number of levels; lists are written 5/20; may be given again, and all are combined",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="vary each field alone, against the defaults, instead of combining them",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="activations to train on")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--k", type=float, help="mean active latents of the BatchTopK SAEs")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one per core, one on a GPU)"
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parsed = parser.parse_args(words)

    benchmark = _benchmark(parsed)
    variants = plan_variants(
        benchmark, parsed.variants or benchmark.variants, parsed.vary, parsed.one_at_a_time
    )
    for seed in parsed.seeds:
        check_seed(seed)
    if parsed.jobs is not None and parsed.jobs < 1:
        raise ValueError(f"jobs={parsed.jobs} is not accepted: give a positive integer.")
    n_jobs = parsed.jobs or (os.cpu_count() or 1 if parsed.device == "cpu" else 1)
    _check_device(parsed.device)
    check_writable("out", parsed.out)
    lacking = missing(benchmark, variants, parsed.seeds, parsed.out, parsed.device)
    return partial(_run, benchmark, variants, lacking, parsed.out, n_jobs, parsed.device)


def _run(
    benchmark: Benchmark,
    variants: list[Variant],
    lacking: dict[int, list[Variant]],
    out: Path,
    n_jobs: int,
    device: str,
) -> int:
    signal.signal(signal.SIGTERM, _stop)  # so that the processes that train end too
    try:
        train_all(benchmark, lacking, out, n_jobs=n_jobs, device=device)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nStopped. {out} has what is finished; the same command goes on.", file=sys.stderr)
        raise
    report = write_report(read_runs(out), out, [variant.name for variant in variants], benchmark)
    print(f"\n{report.table}\n\n{out} has {', '.join(report.files)}, and the SAEs in runs/.")
    return 0


def _stop(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)


def _benchmark(parsed: argparse.Namespace) -> Benchmark:
    if parsed.benchmark == "toy" and parsed.scale is not None:
        raise ValueError(f"--scale {parsed.scale} is not accepted: toy has one size.")
    benchmark = TOY if parsed.benchmark == "toy" else SYNTHSAEBENCH[parsed.scale or "small"]
    if parsed.samples is not None and parsed.samples < benchmark.batch_size:
        raise ValueError(
            f"samples={parsed.samples} is not accepted: give at least a batch, "
            f"{benchmark.batch_size}."
        )
    for name in ("lr", "k"):
        value = getattr(parsed, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} is not accepted: give a positive number.")
    options = {"n_samples": parsed.samples, "lr": parsed.lr, "k": parsed.k}
    given = {name: value for name, value in options.items() if value is not None}
    return replace(benchmark, **given)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} is not accepted here: {error}") from error


def _seeds(text: str) -> list[int]:
    """Seeds as they are listed, or the first so many where there is no comma."""
    parts = text.removesuffix(",").split(",")
    seeds = [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []
    if seeds and "," not in text:
        seeds = list(range(seeds[0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give how many, such as 10, or which, such as 0,3,7"
        )
    return seeds
