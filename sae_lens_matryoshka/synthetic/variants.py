"""The SAEs to compare: architectures, and the Matryoshka SAE with its options varied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, get_type_hints

from sae_lens import TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.runs.config import read_words, unknown_field
from sae_lens_matryoshka.runs.varying import Choice, check_distinct, read_vary
from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.util.checks import invalid_option

_LEVELS = "levels"
_RECOMMENDED = "recommended"
_VARIED = MatryoshkaTrainingSAEConfig.architecture()
_ARCHITECTURES = {"l1": "standard"}  # named as papers do
# The run's seed is also that of sampled prefixes, and synthetic activations have no heads.
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
    axes = read_vary(vary)
    hints = {**get_type_hints(MatryoshkaTrainingSAEConfig), _LEVELS: int}
    can_vary = [field for field in hints if field not in _FIXED]
    for field in axes:
        if field not in can_vary:
            raise unknown_field(field, can_vary)
    values = {
        choice: read_words(field, choice.words, hints[field])
        for field, choices in axes.items()
        for choice in choices
    }
    if _LEVELS in axes and "matryoshka_widths" in axes:
        raise ValueError("levels and matryoshka_widths both set the widths: vary only one.")
    variants: list[Variant] = []
    varied: set[str] = set()
    for name in names:
        has_k = hasattr(base_config(benchmark, name), "k")
        own = [field for field in axes if name == _VARIED or (field == "k" and has_k)]
        varied.update(own)
        each_alone = [(), *((choice,) for field in own for choice in axes[field])]
        combinations = product(*(axes[field] for field in own))
        planned = each_alone if one_at_a_time else combinations
        variants += [
            _variant(benchmark, name, {choice: values[choice] for choice in choices})
            for choices in planned
        ]
    idle = [field for field in axes if field not in varied]
    if idle:
        raise ValueError(
            f"--vary {idle[0]} is not accepted: it varies none of {', '.join(names)}; add "
            f"{_VARIED} to --variants."
        )
    check_distinct(variant.name for variant in variants)
    return variants


def base_config(benchmark: Benchmark, name: str) -> TrainingSAEConfig:
    """The training config of "l1", "recommended" or a registered architecture.

    Raises:
        ValueError: the name is none of these, or the benchmark's k is not accepted.
    """
    sizes = {
        "d_in": benchmark.d_in,
        "d_sae": benchmark.d_sae,
        "k": benchmark.k,
        "matryoshka_widths": list(benchmark.matryoshka_widths),
    }
    if name == _RECOMMENDED:
        n_steps = benchmark.n_samples // benchmark.batch_size
        return MatryoshkaTrainingSAEConfig.recommended(**sizes, n_steps=n_steps)
    architecture = _ARCHITECTURES.get(name, name)
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        accepted = sorted({_RECOMMENDED, *_ARCHITECTURES, *SAE_TRAINING_CLASS_REGISTRY})
        raise ValueError(f"variant {name!r} is not accepted: give one of {', '.join(accepted)}.")
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    if get_type_hints(config_class).get("k") is int:
        if benchmark.k % 1:
            raise invalid_option("k", benchmark.k, f"an integer for {name}")
        sizes["k"] = int(benchmark.k)
    sizes["l1_coefficient"] = benchmark.l1_coefficient
    names = {f.name for f in fields(config_class)}
    return config_class(**{field: value for field, value in sizes.items() if field in names})


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


def _variant(benchmark: Benchmark, name: str, values: Mapping[Choice, Any]) -> Variant:
    changes = {choice.field: value for choice, value in values.items()}
    # in the base config, because a recipe's other options depend on k
    cfg = base_config(replace(benchmark, k=changes.pop("k", benchmark.k)), name)
    if _LEVELS in changes:
        changes["matryoshka_widths"] = level_widths(changes.pop(_LEVELS), cfg.d_sae)
    cfg = replace(cfg, **changes)
    if cfg.normalize_activations not in _NORMALIZATIONS:
        accepted = f"one of {', '.join(map(repr, _NORMALIZATIONS))}"
        raise invalid_option("normalize_activations", cfg.normalize_activations, accepted)
    return Variant(",".join([name, *(choice.label for choice in values)]), cfg)
