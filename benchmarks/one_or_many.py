"""One Matryoshka SAE with five levels against five separate SAEs of those widths.

    python benchmarks/one_or_many.py --out docs/benchmarks/one_or_many

All are trained on the same samples of the small SynthSAEBench, interleaved step by step in one
process. A separate SAE is a BatchTopK SAE with the L0 of the level that it is compared with as its
k, trained as a Matryoshka SAE of one level, which gives the numbers of SAELens' `batchtopk` by the
same sparse code. Those L0 are measured in a first training of the Matryoshka SAE alone. Scores are
those of `sae-matryoshka synth`, of the saved SAEs.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import records
import torch
from sae_lens import SAE
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels.slicing import levels
from sae_lens_matryoshka.synthetic.models import SYNTHSAEBENCH, Benchmark
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.results import read_results, result_folder
from sae_lens_matryoshka.synthetic.scores import score
from sae_lens_matryoshka.synthetic.training import train_together
from sae_lens_matryoshka.synthetic.variants import Variant
from sae_lens_matryoshka.training.widths import paper_widths
from sae_lens_matryoshka.util.markdown import markdown_table

ONE = "one Matryoshka SAE"
SCORES = {"f1": "F1", "mcc": "MCC", "absorption": "absorption", "explained_variance": "var. expl."}
COPIES = 4  # of each parameter in training: itself, its gradient and Adam's two moments


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
    records.silence_libraries()
    torch.set_num_threads(options.threads)
    benchmark = replace(SYNTHSAEBENCH["small"], n_samples=options.samples)
    conditions = {name: getattr(options, name) for name in ("samples", "seed", "threads")}
    conditions |= {name: getattr(benchmark, name) for name in ("batch_size", "d_in", "lr")}
    record = records.start("one_or_many.py", options, "cpu", conditions)
    with tempfile.TemporaryDirectory() as folder:
        record |= compare(benchmark, options.seed, Path(folder))
    print(records.save(options.out, record, *tables(record)))


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
    results = {result.variant: result for result in read_results(folder / "both")}
    return {
        "widths": widths,
        "seconds": {
            "one": results[ONE].seconds,
            "separate": {width: results[str(width)].seconds for width in widths},
        },
        "parameters": {
            width: 2 * benchmark.d_in * width + width + benchmark.d_in for width in widths
        },
        "levels": _level_scores(benchmark, seed, folder / "both"),
        "separate": [dict(results[str(width)].scores) for width in widths],
    }


def _variant(name: str, benchmark: Benchmark, d_sae: int, k: float, widths: list[int]) -> Variant:
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=benchmark.d_in, d_sae=d_sae, k=k, matryoshka_widths=widths
    )
    return Variant(name, cfg)


def _train(benchmark: Benchmark, variants: list[Variant], seed: int, folder: Path) -> None:
    n_steps = benchmark.n_samples // benchmark.batch_size * len(variants)
    with tqdm(total=n_steps, desc=f"{len(variants)} SAEs", unit="step") as bar:
        train_together(benchmark, variants, seed, folder, on_step=bar.update)


def _level_scores(benchmark: Benchmark, seed: int, folder: Path) -> list[dict[str, float]]:
    model = benchmark.build(seed, "cpu")
    sae = SAE.load_from_disk(result_folder(folder, ONE, seed))
    with RandomStream(seed, Purpose.SCORING, "cpu").active():
        return score(levels(sae), model, benchmark.n_scoring_samples)


def tables(record: dict[str, Any]) -> list[str]:
    """Costs and scores as Markdown."""
    one, many = record["seconds"]["one"], sum(record["seconds"]["separate"].values())
    n_many, n_one = sum(record["parameters"].values()), max(record["parameters"].values())
    mib = COPIES * 4 / 2**20
    costs = [
        ["one Matryoshka SAE, five levels", f"{one:.0f} s", f"{n_one:,}", f"{n_one * mib:.1f} MiB"],
        ["five separate SAEs", f"{many:.0f} s", f"{n_many:,}", f"{n_many * mib:.1f} MiB"],
        ["five / one", f"{many / one:.2f}", *[f"{n_many / n_one:.2f}"] * 2],
    ]
    scores = []
    rows = zip(record["widths"], record["levels"], record["separate"], strict=True)
    for width, level, separate in rows:
        cells = [str(width), f"{level['l0']:.2f}, {separate['l0']:.2f}"]
        for name in SCORES:
            both = (values.get(name) for values in (level, separate))
            cells.append(", ".join("–" if value is None else f"{value:.3f}" for value in both))
        scores.append(cells)
    return [
        markdown_table(["", "training steps", "parameters", "memory while training"], costs),
        "Memory is that of parameters, gradients and Adam's moments. Each score: the level, then "
        "the separate SAE of its width and L0.",
        markdown_table(["width", "L0", *SCORES.values()], scores, n_text=0),
    ]


if __name__ == "__main__":
    main()
