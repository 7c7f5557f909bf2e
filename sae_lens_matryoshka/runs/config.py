"""Training configs from YAML and flags, fully checked before a model loads.

Fields go by their dotted names here: `lr`, `sae.k`, `logger.log_to_wandb`.
"""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from simple_parsing.utils import str2bool

from sae_lens_matryoshka.runs.config_file import Loader, flat, read_config
from sae_lens_matryoshka.runs.field_names import (
    DEFAULT_ARCHITECTURE,
    SECTIONS,
    unknown_field,
    without_no,
)
from sae_lens_matryoshka.training.options import NestedOptions
from sae_lens_matryoshka.util.checks import checked_count, invalid_option
from sae_lens_matryoshka.util.devices import warn_of_slow_autocast

# SAELens divides by these, or loops forever, unless they are positive.
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
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# Replacements for pydantic's messages that don't fit YAML
_ACCEPTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "string_type": "text, in quotes if YAML reads it as another type",
}


def load_run_config(
    path: Path | str, overrides: Mapping[str, Any] | None = None
) -> LanguageModelSAERunnerConfig[Any]:
    """The training run that a YAML file describes.

    Args:
        path: A file in the shape of `LanguageModelSAERunnerConfig.to_dict()`. Fields with a default
            may be left out; `sae.architecture` defaults to "matryoshka".
        overrides: Values in the same shape that replace those of the file.

    Raises:
        ValueError: the file cannot be read, or a field in it is unknown, missing or of the wrong
            type; naming the field, its value and what is accepted.
    """
    return build_run_config(read_config(path) | flat(overrides or {}, "overrides"))


def sae_config_class(values: Mapping[str, Any]) -> type[TrainingSAEConfig]:
    """The class that `sae.architecture` names, by default that of "matryoshka"."""
    architecture = values.get("sae.architecture", DEFAULT_ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in SAE_TRAINING_CLASS_REGISTRY:
        names = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        raise invalid_option("sae.architecture", architecture, f"one of {names}")
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def build_run_config(
    values: Mapping[str, Any], flags: Mapping[str, Sequence[str]] | None = None
) -> LanguageModelSAERunnerConfig[Any]:
    """The training run with these values of its fields; raises as `load_run_config`.

    Args:
        values: The values as YAML holds them.
        flags: The words after each `--field`, which replace values: see `read_words`.
    """
    sae_class = sae_config_class(values)
    types = field_types(sae_class)
    values = {
        **values,
        **dict(_from_flag(name, words, types) for name, words in (flags or {}).items()),
    }
    for name in values:
        if name not in types:
            raise unknown_field(name, types)
    for f in fields(sae_class):
        is_required = f.default is MISSING and f.default_factory is MISSING
        if is_required and f"sae.{f.name}" not in values:
            hint = ", or activations by --activations" if f.name == "d_in" else ""
            raise ValueError(f"sae.{f.name} is missing: give a value{hint}.")
    by_section: dict[str, dict[str, Any]] = {"": {}, "sae": {}, "logger": {}}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        by_section[section][field] = _checked(name, value, types[name])
    for name in _COUNTS:
        checked_count(name, values.get(name, 1))

    cfg = LanguageModelSAERunnerConfig(
        sae=sae_class.from_dict(by_section["sae"]),
        logger=LoggingConfig(**by_section["logger"]),
        **by_section[""],
    )
    _check_schedules(cfg)
    if (
        "sae.prefix_seed" not in values
        and isinstance(cfg.sae, NestedOptions)
        and cfg.sae.is_sampled
    ):
        cfg.sae.prefix_seed = checked_count("seed", cfg.seed, 0)
    return cfg


def warn_of_slow_products(cfg: LanguageModelSAERunnerConfig[Any], from_activations: bool) -> None:
    """Warn if the SAE or the model, where one runs, would use bfloat16 on a CPU slow in it."""
    warn_of_slow_autocast(cfg.device, autocast=cfg.autocast)
    if not from_activations:
        warn_of_slow_autocast(cfg.llm_device or cfg.device, autocast_lm=cfg.autocast_lm)


def _check_schedules(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    n_steps = cfg.training_tokens // cfg.train_batch_size_tokens
    if cfg.lr_warm_up_steps + (cfg.lr_decay_steps or 0) > n_steps:
        warnings.warn(
            f"lr_warm_up_steps={cfg.lr_warm_up_steps} and lr_decay_steps={cfg.lr_decay_steps} are "
            f"more than the {n_steps:,} steps of the run.",
            stacklevel=3,
        )
    ends = {"k_anneal_steps": getattr(cfg.sae, "k_anneal_steps", 0)}
    if getattr(cfg.sae, "inner_weight_end", 1) < 1:
        start = cfg.sae.inner_fade_start
        ends |= {"inner_fade_start": start, "inner_fade_steps": start + cfg.sae.inner_fade_steps}
    for name, end in ends.items():
        if end > n_steps:
            raise ValueError(
                f"sae.{name}={getattr(cfg.sae, name)} is not accepted: the run has {n_steps:,} "
                "steps, and its schedules have to end within them."
            )


def field_types(sae_class: type[TrainingSAEConfig]) -> dict[str, Any]:
    """The type of every field of a training config."""

    def of(config_class: type, prefix: str = "") -> dict[str, Any]:
        types = get_type_hints(config_class)
        names = [f.name for f in fields(config_class) if f.name not in SECTIONS]
        return {f"{prefix}{name}": types[name] for name in names}

    run = of(LanguageModelSAERunnerConfig)
    return {**run, "sae.architecture": str, **of(sae_class, "sae."), **of(LoggingConfig, "logger.")}


def _from_flag(name: str, words: Sequence[str], types: Mapping[str, Any]) -> tuple[str, Any]:
    """The field that `--name words` sets, and its value."""
    if name in types:
        if words:
            return name, read_words(name, words, types[name])
        if types[name] is bool:
            return name, True
        raise ValueError(f"--{name} lacks a value.")
    positive = without_no(name)
    if types.get(positive) is bool and not words:
        return positive, False
    raise unknown_field(name, types)


def read_words(name: str, words: Sequence[str], hint: Any) -> Any:
    """The value of a field from words of a command, each read as YAML; several make a list.

    Raises:
        ValueError: it is not of the type `hint`.
    """
    if hint is bool and len(words) == 1:
        with suppress(argparse.ArgumentTypeError):
            return str2bool(words[0])  # also takes t, f, 1 and 0, as SAELens' command line does
    values = [_from_yaml(word) for word in words]
    # A single word is a value, text that YAML reads as another type (such as 1e3), or a list.
    readings = [values[0], words[0], values] if len(words) == 1 else [values]
    for reading in readings:
        with suppress(ValueError):
            return _checked(name, reading, hint)
    return _checked(name, readings[0], hint)


def _from_yaml(word: str) -> Any:
    if word.isdecimal():
        return int(word)  # YAML would read 010 as octal
    if word.lower() in ("null", "none"):
        return None
    try:
        value = yaml.load(word, Loader)
    except (yaml.YAMLError, ValueError):
        return word
    # an empty word, as of a variable that is not set, is no null
    return word if value is None or isinstance(value, str) else value


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value`, as YAML holds it, if it is of the type `hint`."""
    if float in (hint, *get_args(hint)):
        value = [_as_float(item) for item in value] if isinstance(value, list) else _as_float(value)
    # From JSON, strict checks take a list for a tuple.
    text = json.dumps(value, default=str)
    try:
        TypeAdapter(dict if hint is SAEMetadata else hint, config=_STRICT).validate_json(text)
    except ValidationError as error:
        problems = error.errors()
        item = "".join(f"[{i}]" for i in problems[0]["loc"] if isinstance(i, int))
        accepted = [
            _ACCEPTED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
            for problem in problems
        ]
        if NoneType in get_args(hint):
            accepted.append("null")
        raise invalid_option(name + item, problems[0]["input"], " or ".join(accepted)) from error
    # not what pydantic returns, where 40 becomes 40.0
    return tuple(value) if get_origin(hint) is tuple else value


def _as_float(value: Any) -> Any:
    """The number in a text such as 3e-4, which PyYAML does not read as one."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value
