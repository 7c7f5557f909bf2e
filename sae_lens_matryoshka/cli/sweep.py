"""The SAEs of `sae-matryoshka train --vary`, and the table that compares them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

from sae_lens_matryoshka.levels.slicing import set_widths, widths_of
from sae_lens_matryoshka.levels.stats import LevelStats, measure_levels
from sae_lens_matryoshka.runs.sweep import SweepRunner
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

_N_HELD_OUT = 2**15  # activations; fewer than this say little about rare latents


def train_and_compare(
    runner: LanguageModelSAETrainingRunner, cfgs: Mapping[str, LanguageModelSAERunnerConfig[Any]]
) -> int:
    """Train a sweep, and print and save a table of its SAEs.

    Returns:
        The exit code: 1 if an SAE failed.
    """
    n_held_out = min(_N_HELD_OUT, runner.cfg.training_tokens)
    saes, failures, held_out = SweepRunner(runner, cfgs).run(n_held_out)
    out = Path(str(runner.cfg.output_path))
    levels = {name: _measure(out / name, held_out, runner.cfg.device) for name in saes}
    table = markdown_table(
        ["SAE", "width", "L0", "variance explained", "dead latents"],
        [
            [
                name,
                str(row.width),
                f"{row.l0:.2f}",
                f"{row.explained_variance:.3f}",
                f"{row.n_dead}",
            ]
            for name, rows in levels.items()
            for row in rows
        ],
    )
    note = (
        f"Measured on {len(held_out):,} activations drawn after training; a latent is dead if none "
        "of them activates it."
    )
    report = {
        "n_activations": len(held_out),
        "saes": {name: [row._asdict() for row in rows] for name, rows in levels.items()},
        "failed": failures,
    }
    text = f"{table}\n\n{note}\n" + "".join(f"\n{n} failed {why}\n" for n, why in failures.items())
    for name, content in (("sweep.md", text), ("sweep.json", json.dumps(report, indent=2) + "\n")):
        with atomic_file(out / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    print(f"\n{text}\n{out} has this table as sweep.md and sweep.json, and the SAEs.")
    for name in failures:
        print(f"error: {name} failed", file=sys.stderr)
    return 1 if failures else 0


def _measure(folder: Path, held_out: torch.Tensor, device: str) -> list[LevelStats]:
    sae = SAE.load_from_disk(folder, device=device)
    try:
        widths_of(sae)
    except ValueError:  # of an architecture without levels
        set_widths(sae, [sae.cfg.d_sae])
    return measure_levels(sae, held_out)
