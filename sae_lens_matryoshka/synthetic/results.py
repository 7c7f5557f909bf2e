"""Results on disk: SAEs that were trained and scored, each with its settings."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import sae_lens
import torch

import sae_lens_matryoshka
from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.synthetic.variants import Variant

_RESULTS, _SCORES_FILE = "runs", "scores.json"
# Settings that all results of one table share; the benchmark's other fields are defaults of SAEs.
_SHARED = ("n_samples", "batch_size", "lr", "n_scoring_samples")


@dataclass(frozen=True)
class Result:
    """One SAE that was trained and scored."""

    variant: str
    seed: int
    settings: Mapping[str, Any]  # as from `settings_of`
    scores: Mapping[str, float]  # as from `scores.score`, and `l0_training`
    seconds: float  # of its training steps, without drawing samples
    device: str


def result_folder(out: Path, variant: str, seed: int) -> Path:
    """Where a result is saved: `cfg.json`, `sae_weights.safetensors` and `scores.json`."""
    return out / _RESULTS / variant / f"seed_{seed}"


def settings_of(benchmark: Benchmark, variant: Variant, seed: int) -> dict[str, Any]:
    """All that a result's numbers depend on, besides library versions and the device."""
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


def write_scores(folder: Path, **record: Any) -> None:
    """Write `scores.json`, the fields of a `Result`, beside a saved SAE."""
    record["versions"] = {
        "sae_lens_matryoshka": sae_lens_matryoshka.__version__,
        "sae_lens": sae_lens.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps(record, indent=2, allow_nan=False)
    (folder / _SCORES_FILE).write_text(text + "\n")


def read_results(out: Path) -> list[Result]:
    """All results in an output folder, by variant and seed.

    Raises:
        ValueError: a `scores.json` is broken.
    """
    paths = out.glob(f"{_RESULTS}/*/seed_*/{_SCORES_FILE}")
    return sorted(map(_read_result, paths), key=attrgetter("variant", "seed"))


def _read_result(path: Path) -> Result:
    try:
        record = json.loads(path.read_text())
        values = {name: record[name] for name in ("settings", "scores", "seconds", "device")}
        return Result(path.parent.parent.name, record["settings"]["seed"], **values)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of scores: {error!r}.") from error


def untrained_variants(
    benchmark: Benchmark,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    device: str = "cpu",
) -> dict[int, list[Variant]]:
    """The variants without a result in `out`, by seed; seeds without any are left out.

    Raises:
        ValueError: a result in `out` was made with other settings or on another kind of device.
    """
    by_name = {variant.name: variant for variant in variants}
    trained = set()
    for result in read_results(out):
        trained.add((result.variant, result.seed))
        variant = by_name.get(result.variant, variants[0])
        # with the result's own seed, which may differ
        old = _flat(result.settings, result.device)
        new = _flat(settings_of(benchmark, variant, result.seed), device)
        # an option that is newer than the result had its default
        defaults = {f"sae.{f.name}": f.default for f in fields(variant.cfg)}
        old = {name: defaults[name] for name in defaults.keys() & new.keys()} | old
        shared = ("benchmark", *_SHARED, "device")
        compared = old | new if result.variant in by_name else shared
        different = sorted(name for name in compared if old.get(name) != new.get(name))
        if different:
            folder = result_folder(out, result.variant, result.seed)
            of_old, of_new = (
                ", ".join(f"{name}={values.get(name)!r}" for name in different)
                for values in (old, new)
            )
            raise ValueError(
                f"{folder} was made with {of_old}, not {of_new}: give another --out, or the same "
                "settings."
            )
    untrained = {seed: [v for v in variants if (v.name, seed) not in trained] for seed in seeds}
    return {seed: variants for seed, variants in untrained.items() if variants}


def _flat(settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Settings without nesting; of the device only its type, which draws other samples."""
    flat = {name: value for name, value in settings.items() if name != "sae"}
    flat |= {f"sae.{name}": value for name, value in settings.get("sae", {}).items()}
    return {**flat, "device": torch.device(device).type}
