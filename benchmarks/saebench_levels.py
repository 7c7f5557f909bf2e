"""What SAEBench costs on six levels of an SAE, beside one level alone.

    python benchmarks/saebench_levels.py --demo demo_run --out docs/benchmarks/saebench_levels.json

Each round runs `sae-matryoshka eval` (absorption and sparse probing, one seed) on the whole SAE and
on six levels of it, in turn, each into a new folder. Needs the folder that `sae-matryoshka demo`
leaves.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import trange

from sae_lens_matryoshka.demo.compare import EVALUATIONS

WIDTHS = [16, 32, 96, 224, 480, 1024]
EVALS = ["absorption", "sparse_probing"]


def seconds(demo: Path, levels: str) -> float:
    """Wall-clock seconds of the command on some of the levels."""
    settings = [
        f"--{evaluation}.{name}={json.dumps(value)}"
        for evaluation in EVALS
        for name, value in EVALUATIONS.get(evaluation, {}).items()
    ]
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "sae_lens_matryoshka", "eval", "matryoshka"),
                *("--matryoshka-widths", ",".join(map(str, WIDTHS)), "--levels", levels),
                *("--evals", ",".join(EVALS), "--seeds", "1", "--out", out, *settings),
            ],
            cwd=demo,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="SAEBench on six levels and on one.")
    parser.add_argument("--demo", type=Path, default=Path("demo_run"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    one, six = [], []
    for _ in trange(arguments.rounds, desc="Rounds"):
        one.append(seconds(arguments.demo, str(len(WIDTHS))))
        six.append(seconds(arguments.demo, "all"))
    ratios = [b / a for a, b in zip(one, six, strict=True)]
    result = {
        "command": f"python benchmarks/saebench_levels.py --rounds {arguments.rounds}",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU",
        "widths": WIDTHS,
        "evaluations": EVALS,
        "one_level_s": one,
        "six_levels_s": six,
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
