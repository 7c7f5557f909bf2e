"""The SAEs to compare: architectures, and the Matryoshka SAE with its options varied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, get_type_hints

import yaml
from sae_lens import TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.runs.config import checked_value, unknown_field
from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.util.checks import invalid_option

LEVELS = "levels"
RECOMMENDED = "recommended"
_VARIED = MatryoshkaTrainingSAEConfig.architecture()
_ARCHITECTURES = {"l1": "standard"}  # named as papers do
# The run's seed is that of sampled prefixes too, and synthetic activations have no heads.
_FIXED = ("d_in", "d_sae", "device", "metadata", "prefix_seed", "reshape_activations")
# The others estimate a scale from samples, which the SAEs trained beside would miss.
_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True)
class Variant:
    """An SAE to train, and the name of its folder and its table row."""

    name: str
    cfg: TrainingSAEConfig


def plan_variants(
    benchmark: Benchmark,
    names: Sequence[str],
    vary: Sequence[str] = (),
    one_at_a_time: bool = False,
) -> list[Variant]:
    """The variants to train.

    Args:
        benchmark: What they are trained on.
        names: Each "l1", "recommended" or an architecture registered with SAELens.
        vary: Each `field=value,value,…`; all combinations are made. `k` is varied in every variant
            that has it, any other field of `MatryoshkaTrainingSAEConfig` in "matryoshka" alone.
            Lists are written with slashes: `matryoshka_widths=5/20,10/20`. `levels` is a number of
            levels; see `level_widths`.
        one_at_a_time: Instead of all combinations, vary each field alone, after the defaults.

    Raises:
        ValueError: a name, field or value is not accepted, or a variant is given twice.
    """
    axes: dict[str, list[tuple[str, Any]]] = {}
    for text in vary:
        field, values = _axis(text)
        if field in axes:
            raise ValueError(f"--vary {text!r} is not accepted: {field} is varied twice.")
        axes[field] = values
    if LEVELS in axes and "matryoshka_widths" in axes:
        raise ValueError("levels and matryoshka_widths both set the widths: vary only one.")
    bases = {name: base_config(benchmark, name) for name in names}
    if len(bases) < len(names):
        raise ValueError(f"--variants {','.join(names)} is not accepted: a name is given twice.")
    for field in axes:
        if not any(_is_varied(field, name, base) for name, base in bases.items()):
            raise ValueError(
                f"--vary {field} is not accepted: it varies none of {', '.join(names)}; add "
                f"{_VARIED} to --variants."
            )
    variants = []
    for name, base in bases.items():
        choices = [
            [(field, text, value) for text, value in values]
            for field, values in axes.items()
            if _is_varied(field, name, base)
        ]
        combined = [(), *((c,) for axis in choices for c in axis)] if one_at_a_time else None
        for choice in combined or product(*choices):
            k = {field: value for field, _, value in choice}.get("k", benchmark.k)
            # A recipe's other options depend on k.
            sized = base if k == benchmark.k else base_config(replace(benchmark, k=k), name)
            variants.append(_variant(name, sized, choice))
    duplicates = [name for name, n in Counter(v.name for v in variants).items() if n > 1]
    if duplicates:
        raise ValueError(f"--vary gives {duplicates[0]} twice.")
    return variants


def base_config(benchmark: Benchmark, name: str) -> TrainingSAEConfig:
    """The training config of "l1", "recommended" or a registered architecture.

    Raises:
        ValueError: the name is none of these, or the benchmark's k is not accepted.
    """
    if name == RECOMMENDED:
        return MatryoshkaTrainingSAEConfig.recommended(
            d_in=benchmark.d_in,
            d_sae=benchmark.d_sae,
            k=benchmark.k,
            n_steps=benchmark.n_samples // benchmark.batch_size,
            matryoshka_widths=list(benchmark.matryoshka_widths),
        )
    architecture = _ARCHITECTURES.get(name, name)
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        accepted = sorted({RECOMMENDED, *_ARCHITECTURES, *SAE_TRAINING_CLASS_REGISTRY})
        raise ValueError(f"variant {name!r} is not accepted: give one of {', '.join(accepted)}.")
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    sizes = {
        "d_in": benchmark.d_in,
        "d_sae": benchmark.d_sae,
        "k": benchmark.k,
        "l1_coefficient": benchmark.l1_coefficient,
        "matryoshka_widths": list(benchmark.matryoshka_widths),
    }
    names = {f.name for f in fields(config_class)}
    if get_type_hints(config_class).get("k") is int:
        if benchmark.k % 1:
            raise invalid_option("k", benchmark.k, f"an integer for {name}")
        sizes["k"] = int(benchmark.k)
    return config_class(**{name: value for name, value in sizes.items() if name in names})


def level_widths(n_levels: int, d_sae: int) -> list[int]:
    """Widths of levels that each add twice as many latents as the one before, as in the paper.

    They are d_sae · (2^i − 1) / 2^n, and d_sae. Where rounding leaves a level without latents of
    its own, widths grow in equal steps instead: 10 levels of 20 latents are 2, 4, …, 20.

    Raises:
        ValueError: there are more levels than latents.
    """
    if not 1 <= n_levels <= d_sae:
        raise invalid_option("levels", n_levels, f"1 to d_sae={d_sae}")
    doubling = [round(d_sae * (2**i - 1) / 2**n_levels) for i in range(1, n_levels)] + [d_sae]
    if doubling[0] > 0 and len(set(doubling)) == n_levels:
        return doubling
    return [round(d_sae * i / n_levels) for i in range(1, n_levels + 1)]


def _axis(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """Parse `field=value,value` into the field and its values, each as text and as a value."""
    field, equals, values = text.partition("=")
    hints = get_type_hints(MatryoshkaTrainingSAEConfig)
    names = [f.name for f in fields(MatryoshkaTrainingSAEConfig) if f.name not in _FIXED]
    if field not in (*names, LEVELS):
        raise unknown_field(field, [*names, LEVELS])
    if not equals or not all(values.split(",")):
        raise ValueError(f"--vary {text!r} is not accepted: give {field}=value,value,…")
    hint = int if field == LEVELS else hints[field]
    return field, [(value, checked_value(field, _read(value), hint)) for value in values.split(",")]


def _read(text: str) -> Any:
    items = [yaml.safe_load(item) for item in text.split("/")]
    return items if len(items) > 1 else items[0]


def _is_varied(field: str, name: str, base: TrainingSAEConfig) -> bool:
    return name == _VARIED or (field == "k" and hasattr(base, "k"))


def _variant(name: str, base: TrainingSAEConfig, choice: Sequence[tuple[str, str, Any]]) -> Variant:
    changes = {field: value for field, _, value in choice}
    if LEVELS in changes:
        changes["matryoshka_widths"] = level_widths(changes.pop(LEVELS), base.d_sae)
    cfg = replace(base, **changes)
    if cfg.normalize_activations not in _NORMALIZATIONS:
        accepted = f"one of {', '.join(map(repr, _NORMALIZATIONS))}"
        raise invalid_option("normalize_activations", cfg.normalize_activations, accepted)
    # Names become folders, so no slash.
    parts = (f"{field}={text.replace('/', '-')}" for field, text, _ in choice)
    return Variant(",".join([name, *parts]), cfg)
