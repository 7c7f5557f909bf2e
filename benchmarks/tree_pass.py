"""Time and memory of building a tree, beyond running the language model, and how they grow.

    OMP_NUM_THREADS=2 python benchmarks/tree_pass.py --out docs/benchmarks/tree_pass

Each setting runs in a process of its own on random activations, written to disk before. The SAE's
latents fire with Zipfian rates, k per token on average, in five levels; their encoder is random, so
that encoding costs what it does for a trained SAE. Parts are the pass over the tokens (encoding,
codes to disk, sums), the tests of pairs, and finding the examples. Seconds of processors count
those of both threads, and what other programs take is not among them.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import records
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_matryoshka.levels.slicing import set_widths
from sae_lens_matryoshka.tree.building import tree_of
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.sources import StoredActivations
from sae_lens_matryoshka.util.markdown import markdown_table

SETTINGS = ((4096, 1_000_000), (16_384, 250_000), (16_384, 1_000_000), (65_536, 1_000_000))
_ROWS = 8192  # written, and used for thresholds, at a time


@dataclass
class Options:
    """What to measure."""

    d_in: int = 768
    k: int = 32
    settings: str = ",".join(f"{d_sae}x{n}" for d_sae, n in SETTINGS)  # latents x tokens
    out: str | None = None


def make_sae(d_sae: int, d_in: int, k: int) -> JumpReLUSAE:
    """An SAE whose latents fire with Zipfian rates on normal activations, k on average."""
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    rates = 1 / torch.arange(1, d_sae + 1) ** 0.7
    rates = (rates * k / rates.sum()).clamp(max=0.5)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        # a product of a normal activation and a unit row is standard normal
        sae.threshold.copy_(2**0.5 * torch.erfinv(1 - 2 * rates))
    set_widths(sae, [d_sae // 32, 3 * d_sae // 32, 7 * d_sae // 32, 15 * d_sae // 32, d_sae])
    return sae


def measure(d_sae: int, n_tokens: int, d_in: int, k: int, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of this process."""
    path = folder / "activations.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (n_tokens, d_in))
    generator = np.random.default_rng(0)
    for start in range(0, n_tokens, _ROWS):
        rows[start : start + _ROWS] = generator.standard_normal(
            rows[start : start + _ROWS].shape, np.float32
        )
    del rows
    sae = make_sae(d_sae, d_in, k)
    times = [_seconds()]
    gathered = gather(sae, StoredActivations(path, sae), folder / "gathered", n_tokens)
    times.append(_seconds())
    tree = tree_of(gathered, sae)
    times.append(_seconds())
    find_examples(gathered)
    times.append(_seconds())
    walls, cpus = np.diff(times, axis=0).T.tolist()
    return {
        "l0": float(gathered.counts.sum() / n_tokens),
        **dict(zip(("pass_seconds", "test_seconds", "example_seconds"), walls, strict=True)),
        **dict(zip(("pass_cpu", "test_cpu", "example_cpu"), cpus, strict=True)),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "codes_gib": sum(f.stat().st_size for f in gathered.folder.iterdir()) / 2**30,
        "n_tested": tree.summary["n_tested"],
    }


def _seconds() -> tuple[float, float]:
    """Of the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    for field in fields(Options):
        is_int = isinstance(field.default, int)
        parser.add_argument(f"--{field.name}", type=int if is_int else str, default=field.default)
    parser.add_argument("--one", help="measure this setting here, and print it")
    args = vars(parser.parse_args())
    one = args.pop("one")
    options = Options(**args)
    if one:
        d_sae, n_tokens = map(int, one.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            result = measure(d_sae, n_tokens, options.d_in, options.k, Path(folder))
        print(json.dumps(result))
        return
    record = records.start("tree_pass.py", options, "cpu", {"threads": torch.get_num_threads()})
    record["results"] = {}
    for setting in options.settings.split(","):
        flags = [f"--{name}={value}" for name, value in asdict(options).items() if value]
        done = subprocess.run(
            [sys.executable, __file__, *flags, "--one", setting],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ,
        )
        record["results"][setting] = json.loads(done.stdout.splitlines()[-1])
    titles = ["latents", "tokens", "L0", "pass", "tests", "examples", "of processors"]
    titles += ["peak memory", "on disk", "pairs tested"]
    cells = [
        [
            *(f"{int(number):,}" for number in setting.split("x")),
            f"{r['l0']:.1f}",
            f"{r['pass_seconds']:.0f} s",
            f"{r['test_seconds']:.0f} s",
            f"{r['example_seconds']:.0f} s",
            f"{r['pass_cpu'] + r['test_cpu'] + r['example_cpu']:.0f} s",
            f"{r['peak_gib']:.1f} GiB",
            f"{r['codes_gib']:.1f} GiB",
            f"{r['n_tested']:,}",
        ]
        for setting, r in record["results"].items()
    ]
    print(records.save(options.out, record, markdown_table(titles, cells, n_text=0)))


if __name__ == "__main__":
    main()
