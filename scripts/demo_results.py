"""The demo over several seeds of training and of SAEBench: writes docs/results/.

    python scripts/demo_results.py --seeds 3 --work demo_seeds

For each seed of training, `sae-matryoshka demo` runs once and its SAEs are evaluated with as many
seeds of SAEBench. What is finished in the work folder is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sae_lens_matryoshka.demo.compare import EVALUATIONS, SAEBENCH
from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS as DESCRIPTIONS
from sae_lens_matryoshka.util.markdown import markdown_table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COMMAND = [sys.executable, "-m", "sae_lens_matryoshka"]


def run(work: Path, seed: int, n_seeds: int) -> None:
    """Train and evaluate with one seed of training."""
    out = work / f"seed_{seed}"
    if not (out / SAEBENCH / "report.html").exists():
        subprocess.run([*COMMAND, "demo", "--out", out, "--seed", str(seed)], check=True)
    settings = [
        f"--{evaluation}.{name}={json.dumps(value)}"
        for evaluation, values in EVALUATIONS.items()
        for name, value in values.items()
    ]
    subprocess.run(
        [
            *(*COMMAND, "eval", "matryoshka", "--against", "batchtopk"),
            *("--evals", ",".join(EVALUATIONS), "--seeds", str(n_seeds)),
            *("--out", str(SAEBENCH), *settings),
        ],
        cwd=out,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )


def rows_of(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per SAE, level and metric: the mean over all runs, and two spreads."""
    found: dict[tuple[str, int, str, str], list[list[float]]] = {}
    for summary in summaries:
        labels = {(sae["title"], sae["width"]): sae["label"] for sae in summary["saes"]}
        for score in summary["scores"]:
            sae = labels[score["sae"], score["width"]]
            key = (sae, score["width"], score["evaluation"], score["label"])
            found.setdefault(key, []).append(list(score["values"].values()))
    return [
        {
            "sae": sae,
            "width": width,
            "evaluation": evaluation,
            "metric": metric,
            "mean": statistics.fmean(map(statistics.fmean, runs)),
            "std_over_training": statistics.stdev(map(statistics.fmean, runs)),
            "std_over_evaluation": (
                statistics.fmean(map(statistics.stdev, runs)) if len(runs[0]) > 1 else None
            ),
            "runs": runs,
        }
        for (sae, width, evaluation, metric), runs in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± spread over training seeds, and the spread over SAEBench's in brackets."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    cells = {(row["sae"], row["width"], row["metric"]): row for row in rows}
    lines = []
    for sae, width in dict.fromkeys((row["sae"], row["width"]) for row in rows):
        values = []
        for metric in metrics:
            row = cells[sae, width, metric]
            own = row["std_over_evaluation"]
            bracket = "" if own is None else f" ({own:.3f})"
            values.append(f"{row['mean']:.3f} ± {row['std_over_training']:.3f}{bracket}")
        lines.append([sae, str(width), *values])
    return markdown_table(["SAE", "width", *metrics], lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Each evaluation's first metric against width, with its deviation over training seeds."""
    firsts = {name: DESCRIPTIONS[name].metrics[0] for name in EVALUATIONS}
    figure = Figure(figsize=(4.2 * len(firsts), 3.6), layout="constrained")
    axes = figure.subplots(1, len(firsts))
    for axis, metric in zip(axes, firsts.values(), strict=True):
        for sae, style, color in (
            ("matryoshka", "o-", "tab:orange"),
            ("batchtopk", "s", "tab:gray"),
        ):
            own = [row for row in rows if row["sae"] == sae and row["metric"] == metric.label]
            axis.errorbar(
                [row["width"] for row in own],
                [row["mean"] for row in own],
                yerr=[row["std_over_training"] for row in own],
                fmt=style,
                color=color,
                capsize=3,
                label=sae,
            )
        axis.set(xscale="log", xlabel="width (latents)", ylabel=metric.label)
        widths = sorted({row["width"] for row in rows})
        axis.set_xticks(widths, list(map(str, widths)))
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The demo over several seeds: writes docs/results/."
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo_seeds"))
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        run(arguments.work, seed, arguments.seeds)
    files = [
        arguments.work / f"seed_{s}" / SAEBENCH / "summary.json" for s in range(arguments.seeds)
    ]
    rows = rows_of([json.loads(file.read_text()) for file in files])
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/demo_results.py --seeds {arguments.seeds}"
    content = {"command": command, "settings": EVALUATIONS, "rows": rows}
    (RESULTS / "demo.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(rows, RESULTS / "demo.png")
    print(table(rows))


if __name__ == "__main__":
    main()
