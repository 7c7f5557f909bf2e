"""One Matryoshka SAE with five levels against five separate SAEs of those widths.

    python benchmarks/one_or_many.py --out docs/benchmarks/one_or_many

All are trained on the same samples of the small SynthSAEBench, interleaved step by step in one
process. A separate SAE is a BatchTopK SAE whose k is the L0 of the level it stands against, so both
are as sparse; it is computed by the same sparse code, as a Matryoshka SAE of one level, which gives
the numbers of SAELens' `batchtopk`. The k of the five are measured in a first training of the
Matryoshka SAE alone. Scores are those of `sae-matryoshka synth`, of the SAEs as they are saved.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import SAE
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels.slicing import levels
from sae_lens_matryoshka.synthetic.models import SYNTHSAEBENCH, Benchmark
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.runs import read_runs, run_folder
from sae_lens_matryoshka.synthetic.scores import score
from sae_lens_matryoshka.synthetic.training import train_pass
from sae_lens_matryoshka.synthetic.variants import Variant
from sae_lens_matryoshka.training.widths import paper_widths

ONE = "one Matryoshka SAE"
SCORES = {"f1": "F1", "mcc": "MCC", "absorption": "absorption", "explained_variance": "var. expl."}
COPIES = 4  # of each parameter while it is trained: itself, its gradient and Adam's two moments


@dataclass
class Options:
    """What is trained."""

    samples: int = 2_000_000  # activations
    seed: int = 0
    threads: int = 1  # CPU threads
    out: str | None = None  # write OUT.md and OUT.json


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    options: Options = parser.parse_args().options
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    benchmark = replace(SYNTHSAEBENCH["small"], n_samples=options.samples)
    with tempfile.TemporaryDirectory() as folder:
        record = compare(benchmark, options.seed, Path(folder))
    record["conditions"] = {
        "samples": options.samples,
        "seed": options.seed,
        "threads": options.threads,
        "batch_size": benchmark.batch_size,
        "d_in": benchmark.d_in,
        "lr": benchmark.lr,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "sae_lens": sae_lens.__version__,
        "python": platform.python_version(),
    }
    text = report(record)
    print(text)
    if options.out is not None:
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text)
        out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


def compare(benchmark: Benchmark, seed: int, folder: Path) -> dict[str, Any]:
    """Train, time and score both ways."""
    widths = paper_widths(benchmark.d_sae)
    nested = _variant(ONE, benchmark, benchmark.d_sae, benchmark.k, widths)
    _train(benchmark, [nested], seed, folder / "alone")
    l0 = [scores["l0"] for scores in _level_scores(benchmark, seed, folder / "alone")]
    separate = [
        _variant(str(width), benchmark, width, k, [width])
        for width, k in zip(widths, l0, strict=True)
    ]
    _train(benchmark, [nested, *separate], seed, folder / "both")
    runs = {run.variant: run for run in read_runs(folder / "both")}
    of_levels = _level_scores(benchmark, seed, folder / "both")
    return {
        "widths": widths,
        "seconds": {
            "one": runs[ONE].seconds,
            "separate": {width: runs[str(width)].seconds for width in widths},
        },
        "parameters": {
            "one": _n_parameters(benchmark.d_in, benchmark.d_sae),
            "separate": {width: _n_parameters(benchmark.d_in, width) for width in widths},
        },
        "levels": of_levels,
        "separate": [dict(runs[str(width)].scores) for width in widths],
    }


def _variant(name: str, benchmark: Benchmark, d_sae: int, k: float, widths: list[int]) -> Variant:
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=benchmark.d_in, d_sae=d_sae, k=k, matryoshka_widths=widths
    )
    return Variant(name, cfg)


def _train(benchmark: Benchmark, variants: list[Variant], seed: int, folder: Path) -> None:
    n_steps = benchmark.n_samples // benchmark.batch_size * len(variants)
    with tqdm(total=n_steps, desc=f"{len(variants)} SAEs", unit="step") as bar:
        train_pass(benchmark, variants, seed, folder, on_step=bar.update)


def _level_scores(benchmark: Benchmark, seed: int, folder: Path) -> list[dict[str, float]]:
    model = benchmark.build(seed, "cpu")
    sae = SAE.load_from_disk(run_folder(folder, ONE, seed))
    with RandomStream(seed, Purpose.SCORING, "cpu").drawn():
        return score(levels(sae), model, benchmark.n_scoring_samples)


def _n_parameters(d_in: int, d_sae: int) -> int:
    return 2 * d_in * d_sae + d_sae + d_in


def report(record: dict[str, Any]) -> str:
    """The tables, and what they were measured with, as Markdown."""
    one, many = record["seconds"]["one"], sum(record["seconds"]["separate"].values())
    n_one = record["parameters"]["one"]
    n_many = sum(record["parameters"]["separate"].values())
    mib = COPIES * 4 / 2**20
    lines = [
        f"`python benchmarks/one_or_many.py --samples {record['conditions']['samples']} "
        f"--seed {record['conditions']['seed']}`",
        "",
        "| | training steps | parameters | memory while training |",
        "|---|---:|---:|---:|",
        f"| one Matryoshka SAE, five levels | {one:.0f} s | {n_one:,} | {n_one * mib:.1f} MiB |",
        f"| five separate SAEs | {many:.0f} s | {n_many:,} | {n_many * mib:.1f} MiB |",
        f"| five / one | {many / one:.2f} | {n_many / n_one:.2f} | {n_many / n_one:.2f} |",
        "",
        "Memory is that of parameters, gradients and Adam's moments. Each score: the level, then "
        "the separate SAE of its width and L0.",
        "",
        "| width | L0 | " + " | ".join(SCORES.values()) + " |",
        "|---:|---:|" + "---:|" * len(SCORES),
    ]
    rows = zip(record["widths"], record["levels"], record["separate"], strict=True)
    for width, level, separate in rows:
        cells = [f"{level['l0']:.2f}, {separate['l0']:.2f}"]
        for name in SCORES:
            both = (scores.get(name) for scores in (level, separate))
            cells.append(", ".join("–" if value is None else f"{value:.3f}" for value in both))
        lines.append(f"| {width} | " + " | ".join(cells) + " |")
    conditions = ", ".join(f"{name} {value}" for name, value in record["conditions"].items())
    return "\n".join([*lines, "", conditions, ""])


if __name__ == "__main__":
    main()
