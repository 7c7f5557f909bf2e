"""Training configs from YAML: every mistake is named before a model is loaded."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.options import NestedOptions
from sae_lens_matryoshka.util.checks import checked_count

_SECTIONS = ("sae", "logger")
# SAELens divides by these, or loops over them for ever, where they are not positive.
_COUNTS = (
    "context_size",
    "n_batches_in_buffer",
    "training_tokens",
    "store_batch_size_prompts",
    "train_batch_size_tokens",
    "feature_sampling_window",
    "logger.wandb_log_frequency",
    "logger.eval_every_n_wandb_logs",
)
_ACCEPTED = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text, in quotes where YAML would read it as something else",
    type(None): "null",
    SAEMetadata: "a mapping",
}


def load_run_config(
    path: Path | str, overrides: Mapping[str, Any] | None = None
) -> LanguageModelSAERunnerConfig[Any]:
    """The training run that a YAML file describes.

    Args:
        path: A file in the shape of `LanguageModelSAERunnerConfig.to_dict()`. What has a default
            may be left out, `sae.architecture` too: it is "matryoshka" then.
        overrides: Values in the same shape that replace those of the file.

    Raises:
        ValueError: the file cannot be read, or a field in it is unknown, missing or of the wrong
            type; naming the field, its value and what is accepted.
    """
    return build_run_config(merged(read_config(path), overrides or {}))


def read_config(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file, its fields not yet checked.

    Raises:
        ValueError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{path}{line} is not YAML: {problem}.") from error
    return _mapping(str(path), config)


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the values of `overrides`; the sections of both are merged, nothing else is."""
    result = dict(config)
    for name, value in overrides.items():
        is_section = name in _SECTIONS and isinstance(value, Mapping)
        result[name] = merged(_mapping(name, config.get(name)), value) if is_section else value
    return result


def sae_config_class(config: Mapping[str, Any]) -> type[TrainingSAEConfig]:
    """The class that `sae.architecture` names; the package's own where nothing does.

    Raises:
        ValueError: no such training architecture is registered.
    """
    default = MatryoshkaTrainingSAEConfig.architecture()
    architecture = _mapping("sae", config.get("sae")).get("architecture", default)
    if not isinstance(architecture, str) or architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"sae.architecture={architecture!r} is not registered; accepted: "
            f"{', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}."
        )
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def build_run_config(config: Mapping[str, Any]) -> LanguageModelSAERunnerConfig[Any]:
    """The training run that a mapping describes; see `load_run_config`."""
    sae_class = sae_config_class(config)
    names = field_names(sae_class)
    sections = {name: _mapping(name, config.get(name)) for name in _SECTIONS}
    nested = (f"{section}.{name}" for section in sections for name in sections[section])
    for name in (*config, *nested):
        if name not in names:
            raise unknown_field(str(name), names)
    sae = {name: value for name, value in sections["sae"].items() if name != "architecture"}
    run = {name: value for name, value in config.items() if name not in sections}

    checked_sae = _checked(sae_class, sae, "sae.")
    checked_logger = _checked(LoggingConfig, sections["logger"], "logger.")
    checked_run = _checked(LanguageModelSAERunnerConfig, run, "")
    for name in _COUNTS:
        section, _, key = name.rpartition(".")
        value = (checked_logger if section else checked_run).get(key, 1)
        if value < 1:
            raise ValueError(f"{name}={value!r} is not accepted: give a positive integer.")
    cfg = LanguageModelSAERunnerConfig(
        **checked_run, sae=sae_class.from_dict(checked_sae), logger=LoggingConfig(**checked_logger)
    )
    _check_schedules(cfg)
    if isinstance(cfg.sae, NestedOptions) and cfg.sae.is_sampled and "prefix_seed" not in sae:
        cfg.sae.prefix_seed = checked_count("seed", cfg.seed, 0)
    return cfg


def _check_schedules(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    n_steps = cfg.training_tokens // cfg.train_batch_size_tokens
    ends = {"k_anneal_steps": getattr(cfg.sae, "k_anneal_steps", 0)}
    if getattr(cfg.sae, "inner_weight_end", 1) < 1:
        start = cfg.sae.inner_fade_start
        ends |= {"inner_fade_start": start, "inner_fade_steps": start + cfg.sae.inner_fade_steps}
    for name, end in ends.items():
        if end > n_steps:
            raise ValueError(
                f"sae.{name}={getattr(cfg.sae, name)} is not accepted: the run has {n_steps:,} "
                "steps, and its schedules are to end within them."
            )


def field_names(sae_class: type[TrainingSAEConfig]) -> list[str]:
    """Every field of a training config, the nested ones with dots: `lr`, `sae`, `sae.k`, …"""
    return [
        *(f.name for f in fields(LanguageModelSAERunnerConfig)),
        "sae.architecture",
        *(f"sae.{f.name}" for f in fields(sae_class)),
        *(f"logger.{f.name}" for f in fields(LoggingConfig)),
    ]


def unknown_field(name: str, names: Sequence[str]) -> ValueError:
    """The error for a field that is not among `names`, with the nearest of them."""
    leaf, leaves = _leaf(name), {_leaf(known) for known in names}
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=3)
    suggested = sorted(
        (known for known in names if _leaf(known) in near),
        key=lambda known: near.index(_leaf(known)),
    )
    hint = f"; did you mean {' or '.join(suggested)}?" if suggested else "."
    return ValueError(f"{name} is not a field of a training config{hint}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None and name in _SECTIONS:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} is not accepted: give a mapping of fields to values.")
    dotted = [key for key in value if isinstance(key, str) and "." in key]
    if dotted:
        nested = dotted[0].replace(".", ": {", 1)
        raise ValueError(f"{dotted[0]} is not a field: nest it, {nested}: …}}.")
    return dict(value)


def _checked(config_class: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`values` as the fields of `config_class` take them."""
    hints = get_type_hints(config_class)
    for f in fields(config_class):
        is_required = f.default is MISSING and f.default_factory is MISSING
        if is_required and f.name not in values and f.name not in _SECTIONS:
            raise ValueError(f"{prefix}{f.name} is missing; accepted: {_accepted(hints[f.name])}.")
    return {name: _value(prefix + name, value, hints[name]) for name, value in values.items()}


def _value(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` takes it, or ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            with suppress(ValueError):
                return _value(name, value, option)
    elif origin is Literal:
        if value in args:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list | tuple):
            return origin(_value(f"{name}[{i}]", item, args[0]) for i, item in enumerate(value))
    elif origin is dict or hint is SAEMetadata:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        # YAML 1.1 reads 3e-4, which has no dot, as text.
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            number = _number(value)
            if math.isfinite(number):
                return number if isinstance(value, str) else value
    elif type(value) is hint:
        return value
    raise ValueError(f"{name}={value!r} is not accepted: give {_accepted(hint)}.")


def _number(value: str | float) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _accepted(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_accepted(option) for option in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (list, tuple):
        return f"a list, each entry {_accepted(args[0])}"
    return _ACCEPTED.get(hint, "a mapping")
