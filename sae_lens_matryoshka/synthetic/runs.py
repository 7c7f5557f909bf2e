"""Finished runs on disk, each with the settings that it was made with."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import sae_lens
import torch

import sae_lens_matryoshka
from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.synthetic.variants import Variant

SCORES_FILE = "scores.json"
_RUNS = "runs"
# What makes two runs comparable; the other fields are defaults of the SAEs.
_SHARED = ("n_samples", "batch_size", "lr", "n_scoring_samples")


@dataclass(frozen=True)
class Run:
    """One SAE that was trained and scored.

    Attributes:
        variant: Its name.
        seed: Of the run.
        settings: As `settings_of` gives them.
        scores: Name → value; see `scores.score`.
        seconds: Of its training steps, without making samples.
        device: Where it was trained.
    """

    variant: str
    seed: int
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    seconds: float
    device: str


def run_folder(out: Path, variant: str, seed: int) -> Path:
    """Where a run is, or will be: `cfg.json`, `sae_weights.safetensors` and `scores.json`."""
    return out / _RUNS / variant / f"seed_{seed}"


def settings_of(benchmark: Benchmark, variant: Variant, seed: int) -> dict[str, Any]:
    """All that decides the numbers of a run, but versions and the device."""
    sae = {
        f.name: getattr(variant.cfg, f.name)
        for f in fields(variant.cfg)
        if f.name not in ("metadata", "device")
    }
    settings = {
        "benchmark": benchmark.name,
        **{name: getattr(benchmark, name) for name in _SHARED},
        "seed": seed,
        "architecture": variant.cfg.architecture(),
        "sae": sae,
    }
    # As it is read back. An option may itself be a dataclass, such as a schedule.
    return json.loads(json.dumps(settings, default=asdict))


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {
        "sae_lens_matryoshka": sae_lens_matryoshka.__version__,
        "sae_lens": sae_lens.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_runs(out: Path) -> list[Run]:
    """All finished runs of an output folder, by variant and seed.

    Raises:
        ValueError: a file of scores is not one.
    """
    paths = out.glob(f"{_RUNS}/*/seed_*/{SCORES_FILE}")
    return sorted(map(_read_run, paths), key=lambda run: (run.variant, run.seed))


def _read_run(path: Path) -> Run:
    try:
        record = json.loads(path.read_text())
        return Run(
            variant=path.parent.parent.name,
            seed=record["settings"]["seed"],
            settings=record["settings"],
            scores=record["scores"],
            seconds=record["seconds"],
            device=record["device"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of scores: {error!r}.") from error


def missing(
    benchmark: Benchmark,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    device: str = "cpu",
) -> dict[int, list[Variant]]:
    """What is not in an output folder yet: seed → variants, without the seeds that lack none.

    Raises:
        ValueError: a run is there with other settings, or one that no table can have beside these.
    """
    runs = read_runs(out)
    by_name = {variant.name: variant for variant in variants}
    for run in runs:
        if torch.device(run.device).type != torch.device(device).type:
            raise ValueError(
                f"{run_folder(out, run.variant, run.seed)} was made with device={run.device!r}, "
                f"and device={device!r}, which draws other samples, is asked for: give another "
                "--out, or the same device."
            )
        # Any run's seed, to compare what is not the seed.
        asked = settings_of(benchmark, by_name.get(run.variant, variants[0]), run.seed)
        names = asked if run.variant in by_name else ("benchmark", *_SHARED)
        _compare(run, {name: asked[name] for name in names}, out)
    there = {(run.variant, run.seed) for run in runs}
    lacking = {seed: [v for v in variants if (v.name, seed) not in there] for seed in seeds}
    return {seed: variants for seed, variants in lacking.items() if variants}


def _compare(run: Run, asked: Mapping[str, Any], out: Path) -> None:
    old, new = _flat(run.settings), _flat(asked)
    differing = sorted(
        name
        for name in new | {name: None for name in old if name.partition(".")[0] in asked}
        if old.get(name) != new.get(name)
    )
    if differing:
        told = ", ".join(f"{name}={old.get(name)!r}" for name in differing)
        wanted = ", ".join(f"{name}={new.get(name)!r}" for name in differing)
        raise ValueError(
            f"{run_folder(out, run.variant, run.seed)} was made with {told}, and {wanted} is asked "
            "for: give another --out, or the same settings."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in settings.items() if name != "sae"}
    return {**flat, **{f"sae.{name}": value for name, value in settings.get("sae", {}).items()}}
