"""Training configs from YAML and flags; every mistake is named before a model is loaded."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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

from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.options import NestedOptions
from sae_lens_matryoshka.util.checks import checked_count, invalid_option

_SECTIONS = ("sae", "logger")
# SAELens divides by these, or loops forever, if they are not positive.
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


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number, as YAML 1.2 does and PyYAML does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d[\d_]*\.?[\d_]*[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def load_run_config(
    path: Path | str, overrides: Mapping[str, Any] | None = None
) -> LanguageModelSAERunnerConfig[Any]:
    """The training run that a YAML file describes.

    Args:
        path: A file in the shape of `LanguageModelSAERunnerConfig.to_dict()`. Fields with a default
            may be left out; `sae.architecture` too, which is "matryoshka" then.
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
        config = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{path}{line} is not YAML: {problem}.") from error
    return _mapping(str(path), config)


def read_yaml(text: str) -> Any:
    """The value that YAML text stands for."""
    return yaml.load(text, _Loader)


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the values of `overrides`; only the sections `sae` and `logger` are merged."""
    result = dict(config)
    for name, value in overrides.items():
        is_section = name in _SECTIONS and isinstance(value, Mapping)
        result[name] = merged(_mapping(name, config.get(name)), value) if is_section else value
    return result


def sae_config_class(config: Mapping[str, Any]) -> type[TrainingSAEConfig]:
    """The class that `sae.architecture` names; if it is not set, that of "matryoshka".

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
    hints = field_types(sae_class)
    values = {str(name): value for name, value in config.items() if name not in _SECTIONS}
    for section in _SECTIONS:
        nested = _mapping(section, config.get(section))
        values |= {f"{section}.{name}": value for name, value in nested.items()}
    values.pop("sae.architecture", None)
    for name in values:
        if name not in hints:
            raise unknown_field(name, hints)
    for f in fields(sae_class):
        is_required = f.default is MISSING and f.default_factory is MISSING
        if is_required and f"sae.{f.name}" not in values:
            raise ValueError(f"sae.{f.name} is missing.")
    values = {name: checked_value(name, value, hints[name]) for name, value in values.items()}
    for name in _COUNTS:
        checked_count(name, values.get(name, 1))

    by_section: dict[str, dict[str, Any]] = {"": {}, "sae": {}, "logger": {}}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        by_section[section][field] = value
    cfg = LanguageModelSAERunnerConfig(
        sae=sae_class.from_dict(by_section["sae"]),
        logger=LoggingConfig(**by_section["logger"]),
        **by_section[""],
    )
    _check_schedules(cfg)
    if (
        isinstance(cfg.sae, NestedOptions)
        and cfg.sae.is_sampled
        and "sae.prefix_seed" not in values
    ):
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
                "steps, and its schedules have to end within them."
            )


def field_types(sae_class: type[TrainingSAEConfig]) -> dict[str, Any]:
    """The type of every field of a training config, the nested ones with dots: `lr`, `sae.k`, …"""
    return {
        **get_type_hints(LanguageModelSAERunnerConfig),
        "sae.architecture": str,
        **{f"sae.{name}": hint for name, hint in get_type_hints(sae_class).items()},
        **{f"logger.{name}": hint for name, hint in get_type_hints(LoggingConfig).items()},
    }


def unknown_field(name: str, names: Iterable[str]) -> ValueError:
    """The error for a field that is not one of `names`, with the nearest of them."""
    leaf_of = {known: known.rpartition(".")[2] for known in names}
    near = difflib.get_close_matches(name.rpartition(".")[2], leaf_of.values(), n=1)
    suggested = [known for known, leaf in leaf_of.items() if leaf in near]
    hint = f"; did you mean {' or '.join(suggested)}?" if suggested else "."
    return ValueError(f"{name} is not a field of a training config{hint}")


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


def overrides_of(
    flags: Mapping[str, Sequence[str]], sae_class: type[TrainingSAEConfig]
) -> dict[str, Any]:
    """The fields that flags set, in the shape of a config.

    Args:
        flags: The words behind `--field`, by field. They are read as YAML; several are a list.
        sae_class: The class of the section `sae`.

    Raises:
        ValueError: a field is unknown, or a value is of the wrong type.
    """
    hints = field_types(sae_class)
    overrides: dict[str, Any] = {}
    for name, words in flags.items():
        section, _, field = name.rpartition(".")
        negated = f"{section}.{field[2:]}".lstrip(".") if field.startswith("no") else ""
        if name in hints:
            value = _from_words(name, words, hints[name])
        elif hints.get(negated) is bool and not words:  # --nostreaming
            field, value = field[2:], False
        else:
            raise unknown_field(name, hints)
        (overrides.setdefault(section, {}) if section else overrides)[field] = value
    return overrides


def _from_words(name: str, words: Sequence[str], hint: Any) -> Any:
    if not words and hint is not bool:
        raise ValueError(f"--{name} lacks a value.")
    values = [_from_yaml(word) for word in words]
    # One word may be a value, text that YAML reads as something else (a name of digits), or a list.
    readings = [values[0], words[0], values] if len(words) == 1 else [values or True]
    for reading in readings:
        with suppress(ValueError):
            return checked_value(name, reading, hint)
    return checked_value(name, readings[0], hint)


def _from_yaml(word: str) -> Any:
    try:
        value = read_yaml(word)
    except (yaml.YAMLError, ValueError):  # the second one for dates such as 2000-99-99
        return word
    return word if isinstance(value, str) else value


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """`value`, read from YAML, as the type `hint` takes it.

    Raises:
        ValueError: it is of another type.
    """
    text = json.dumps(value, default=str)  # JSON has no tuples, so lists are accepted for them
    try:
        TypeAdapter(dict if hint is SAEMetadata else hint, config=_STRICT).validate_json(text)
    except ValidationError as error:
        problems = error.errors()
        item = "".join(f"[{i}]" for i in problems[0]["loc"] if isinstance(i, int))
        accepted = [problem["msg"].removeprefix("Input should be ") for problem in problems]
        if NoneType in get_args(hint):
            accepted.append("null")
        raise invalid_option(name + item, problems[0]["input"], " or ".join(accepted)) from error
    value = json.loads(text)
    return tuple(value) if get_origin(hint) is tuple else value
