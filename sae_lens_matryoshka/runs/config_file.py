"""Reads the YAML file of a training run, without SAELens, whose import takes seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sae_lens_matryoshka.runs.field_names import SECTIONS
from sae_lens_matryoshka.util.checks import invalid_option


class Loader(yaml.SafeLoader):
    """Reads dates as text: no field is a date."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_config(path: Path | str) -> dict[str, Any]:
    """The fields in a YAML file, their values not yet checked; raises as `load_run_config`."""
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{path}{line} is not YAML: {problem}.") from error
    return flat(config, str(path))


def flat(config: Any, name: str, prefix: str = "") -> dict[str, Any]:
    """The fields of a nested config, or with a prefix of its section; errors call it `name`."""
    if not isinstance(config, Mapping):
        raise invalid_option(name, config, "a mapping of fields to values")
    values: dict[str, Any] = {}
    for key, value in config.items():
        section, dot, field = str(key).partition(".")
        if dot:
            raise ValueError(f"{key} is not a field: nest it, {section}: {{{field}: …}}.")
        if key in SECTIONS and not prefix:
            values |= flat({} if value is None else value, key, f"{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
