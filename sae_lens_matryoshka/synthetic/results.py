"""Results on disk: SAEs that were trained and scored, each with its settings."""

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
_RESULTS = "runs"
# What all results in one table have in common; the benchmark's other fields are defaults of SAEs.
_SHARED = ("n_samples", "batch_size", "lr", "n_scoring_samples")


@dataclass(frozen=True)
class Result:
    """One SAE that was trained and scored."""

    variant: str
    seed: int
    settings: Mapping[str, Any]  # as from `settings_of`
    scores: Mapping[str, float]  # as from `scores.score`
    seconds: float  # of its training steps, without drawing samples
    device: str


def result_folder(out: Path, variant: str, seed: int) -> Path:
    """Where a result is saved: `cfg.json`, `sae_weights.safetensors` and `scores.json`."""
    return out / _RESULTS / variant / f"seed_{seed}"


def settings_of(benchmark: Benchmark, variant: Variant, seed: int) -> dict[str, Any]:
    """All that decides a result's numbers, besides library versions and the device."""
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
    # As JSON returns it. An option may itself be a dataclass, such as a schedule.
    return json.loads(json.dumps(settings, default=asdict))


def library_versions() -> dict[str, str]:
    return {
        "sae_lens_matryoshka": sae_lens_matryoshka.__version__,
        "sae_lens": sae_lens.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_results(out: Path) -> list[Result]:
    """All results in an output folder, by variant and seed.

    Raises:
        ValueError: a `scores.json` is broken.
    """
    paths = out.glob(f"{_RESULTS}/*/seed_*/{SCORES_FILE}")
    return sorted(map(_read_result, paths), key=lambda result: (result.variant, result.seed))


def _read_result(path: Path) -> Result:
    try:
        record = json.loads(path.read_text())
        return Result(
            variant=path.parent.parent.name,
            seed=record["settings"]["seed"],
            settings=record["settings"],
            scores=record["scores"],
            seconds=record["seconds"],
            device=record["device"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of scores: {error!r}.") from error


def untrained_variants(
    benchmark: Benchmark,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    device: str = "cpu",
) -> dict[int, list[Variant]]:
    """The variants of each seed without a result in `out`; seeds without any are left out.

    Raises:
        ValueError: a result in `out` was made with other settings or on another kind of device.
    """
    results = read_results(out)
    by_name = {variant.name: variant for variant in variants}
    for result in results:
        folder = result_folder(out, result.variant, result.seed)
        if torch.device(result.device).type != torch.device(device).type:
            raise ValueError(
                f"{folder} was made with device={result.device!r}; device={device!r} draws other "
                "samples: give another --out, or the same device."
            )
        # With the result's own seed, so that the seed is not among the differences.
        settings = settings_of(benchmark, by_name.get(result.variant, variants[0]), result.seed)
        if result.variant not in by_name:
            settings = {name: settings[name] for name in ("benchmark", *_SHARED)}
        _check_same_settings(result, settings, folder)
    trained = {(result.variant, result.seed) for result in results}
    untrained = {seed: [v for v in variants if (v.name, seed) not in trained] for seed in seeds}
    return {seed: variants for seed, variants in untrained.items() if variants}


def _check_same_settings(result: Result, settings: Mapping[str, Any], folder: Path) -> None:
    old, new = (
        _flat({name: values[name] for name in settings if name in values})
        for values in (result.settings, settings)
    )
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    if names:
        of_old, of_new = (
            ", ".join(f"{name}={values.get(name)!r}" for name in names) for values in (old, new)
        )
        raise ValueError(
            f"{folder} was made with {of_old}, not {of_new}: give another --out, or the same "
            "settings."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in settings.items() if name != "sae"}
    return {**flat, **{f"sae.{name}": value for name, value in settings.get("sae", {}).items()}}
