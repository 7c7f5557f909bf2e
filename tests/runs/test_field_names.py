"""Fields read from source files are those of the imported classes, and a doubt refuses nothing."""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.runs import field_names as sources
from sae_lens_matryoshka.runs.config import build_run_config, field_types

CLASSES = cache(sources._classes)
ARCHITECTURES = sorted(SAE_TRAINING_CLASS_REGISTRY)
UNKNOWN = [
    *("wrong", "k", "lrr", "sea", "sae", "verbos", "nostreamin", "n_eval_batch", "device_"),
    *("sae.kk", "sae.lr", "sae.matryoshka_width", "sae.l1_coeficient", "sae.k_is_integer"),
    "logger.k",
]


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, SAELens is not imported yet."""
    monkeypatch.delitem(sys.modules, "sae_lens")


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source files are read once for several tests."""
    monkeypatch.setattr(sources, "_classes", CLASSES)


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_source_files_name_every_field(architecture: str) -> None:
    names = sources.field_names(architecture)
    assert len(names) == len(set(names))
    assert set(names) == {*field_types(SAE_TRAINING_CLASS_REGISTRY[architecture][1])}


@pytest.mark.usefixtures("not_imported", "read_once")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field_is_accepted(architecture: str) -> None:
    values = {"sae.architecture": architecture}
    names = field_types(SAE_TRAINING_CLASS_REGISTRY[architecture][1])
    sections = [name.rpartition(".") for name in names]
    negated = [f"{section}{dot}no{leaf}" for section, dot, leaf in sections]
    sources.check_field_names(dict.fromkeys(names) | values, [])
    sources.check_field_names(values, [*names, *negated])
    sources.check_field_names(values, ["vary", "activations"], options=("activations", "vary"))


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", UNKNOWN)
def test_refusal_is_that_of_the_whole_check(
    monkeypatch: pytest.MonkeyPatch, architecture: str, name: str
) -> None:
    values = {"sae.architecture": architecture}
    with pytest.raises(ValueError, match=" is not a field of a training config") as late:
        build_run_config(values, {name: ["3"]})
    monkeypatch.delitem(sys.modules, "sae_lens")
    with pytest.raises(ValueError, match=" is not a field of a training config") as of_flag:
        sources.check_field_names(values, ["lr", name])
    with pytest.raises(ValueError, match=" is not a field of a training config") as of_file:
        sources.check_field_names({**values, "lr": 1, name: 3}, [])
    assert str(of_flag.value) == str(of_file.value) == str(late.value)


@pytest.mark.usefixtures("not_imported", "read_once")
def test_options_of_the_command_are_suggested() -> None:
    with pytest.raises(ValueError, match=r"dryrun is not a field .* did you mean dry-run\?"):
        sources.check_field_names({}, ["dryrun"], options=("dry-run",))


@pytest.mark.usefixtures("not_imported", "read_once")
@pytest.mark.parametrize("architecture", ["mine", "", None, 3, ["topk"], {"topk": 1}])
def test_architecture_that_is_in_no_source_file(architecture: object) -> None:
    sources.check_field_names({"sae.architecture": architecture}, ["sae.its_own"])


RUN = "# dataclass\nclass LanguageModelSAERunnerConfig:\n    lr: float\n"
LOGGER = "class LoggingConfig:\n    verbose: bool\n"
SAE = (
    "class MyTrainingSAEConfig(base.Base[T], ABC):\n    k: int\n    @classmethod\n"
    "    def architecture(cls):\n        return 'matryoshka'\n"
)
BASE = "class Base:\n    d_in: int\n    shared: ClassVar[int]\n"


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize(
    ("source", "names"),
    [
        (RUN + LOGGER + SAE + BASE, "lr sae.architecture sae.d_in sae.k logger.verbose"),
        (RUN + LOGGER + SAE + "class Base(Base): ...", "lr sae.architecture sae.k logger.verbose"),
        (RUN + LOGGER + SAE, ""),  # the base is elsewhere
        (RUN + SAE + BASE, ""),
        (RUN + LOGGER, ""),
        (RUN + "if", ""),  # of another version of Python
        ("", ""),  # compiled files alone
    ],
)
def test_doubt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, names: str) -> None:
    (tmp_path / "config.py").write_text(source)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(sources, "find_spec", {"sae_lens": spec}.get)
    assert sorted(sources.field_names("matryoshka")) == sorted(names.split())
    if not names:
        sources.check_field_names({}, ["wrong"])


def test_imported_classes_are_asked_instead() -> None:
    sources.check_field_names({}, ["wrong"])  # they may be registered by anyone
