"""The names of a training config's fields, read from source files: importing SAELens takes seconds.

The fields are those of SAELens' dataclasses and of this package's.
"""

import ast
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECTIONS = ("sae", "logger")
DEFAULT_ARCHITECTURE = "matryoshka"


def check_field_names(
    values: Mapping[str, Any], flags: Iterable[str], options: Sequence[str] = ()
) -> None:
    """Refuse unknown fields before SAELens is imported; in doubt, leave them to `build_run_config`.

    Args:
        values: The values of a config file.
        flags: The flags of a command, without "--".
        options: Flags that are the command's own.

    Raises:
        ValueError: a name is neither a field of the run's architecture nor an option.
    """
    if "sae_lens" in sys.modules:
        return  # then other classes may be registered, and `build_run_config` is fast
    known = field_names(values.get("sae.architecture", DEFAULT_ARCHITECTURE))
    for name in [*flags, *values] if known else []:
        if not {name, without_no(name)} & {*known, *options}:
            raise unknown_field(name, [*known, *options])


def field_names(architecture: Any) -> list[str]:
    """The fields of a config of this architecture; none if the source files leave a doubt."""
    try:
        classes = _classes()
        sae_configs = {
            name
            for name, nodes in classes.items()
            if name.endswith("TrainingSAEConfig")
            and any(f"return {architecture!r}" in ast.unparse(node) for node in nodes)
        }
        if not sae_configs:
            return []
        run = _fields({"LanguageModelSAERunnerConfig"}, classes) - set(SECTIONS)
        sae = _fields(sae_configs, classes) | {"architecture"}
        logger = _fields({"LoggingConfig"}, classes)
    except (KeyError, OSError, SyntaxError):  # KeyError: a class that no source file defines
        return []
    return [*run, *(f"sae.{name}" for name in sae), *(f"logger.{name}" for name in logger)]


def _classes() -> dict[str, list[ast.ClassDef]]:
    """The classes in files with dataclasses; those of one name together."""
    classes: dict[str, list[ast.ClassDef]] = {}
    for spec in (find_spec("sae_lens"), find_spec("sae_lens_matryoshka")):
        for folder in (spec and spec.submodule_search_locations) or []:
            for path in Path(folder).rglob("*.py"):
                source = path.read_bytes()
                for node in ast.parse(source).body if b"dataclass" in source else []:
                    if isinstance(node, ast.ClassDef):
                        classes.setdefault(node.name, []).append(node)
    return classes


def _fields(names: set[str], classes: Mapping[str, Sequence[ast.ClassDef]]) -> set[str]:
    """The fields of the classes with these names, and of their bases."""
    fields: set[str] = set()
    done = {"ABC", "Generic"}
    while names := names - done:
        done |= names
        nodes = [node for name in names for node in classes[name]]
        bases = [ast.unparse(base) for node in nodes for base in node.bases]
        names = {base.partition("[")[0].rpartition(".")[2] for base in bases}
        fields |= {
            ast.unparse(line.target)
            for node in nodes
            for line in node.body
            if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
        }
    return fields


def without_no(name: str) -> str:
    """The field that `--noname` sets to false: `streaming` for `nostreaming`."""
    return re.sub(r"\bno(\w+)$", r"\1", name)


def unknown_field(name: str, names: Iterable[str]) -> ValueError:
    """The error for a field that is not one of `names`."""
    leaf_of = {known: known.rpartition(".")[2] for known in (*names, *SECTIONS)}
    near = difflib.get_close_matches(name.rpartition(".")[2], leaf_of.values(), n=1)
    suggested = [known for known, leaf in leaf_of.items() if leaf in near]
    hint = f"; did you mean {' or '.join(suggested)}?" if suggested else "."
    return ValueError(f"{name} is not a field of a training config{hint}")
