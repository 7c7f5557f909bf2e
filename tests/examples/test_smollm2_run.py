"""Which SAEs the experiment of examples/smollm2 leaves out; tests/saebench runs the experiment."""

import json
from pathlib import Path

import pytest

from examples.smollm2.arms import Arm
from examples.smollm2.run import SETTINGS, Experiment, main
from sae_lens_matryoshka.demo.smollm2 import MODEL

COMPLETE, NO_TREE, NO_CORE, HERE = (Arm("batchtopk", 6, seed) for seed in range(4))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of the experiment: results of SAEs, of which it holds `HERE` alone."""
    for name in (MODEL, "texts/train", "texts/held_out", "results"):
        (tmp_path / name).mkdir(parents=True)
    evaluations = {name: {"settings": settings} for name, settings in SETTINGS.items()}
    other_core = {**evaluations, "core": {"settings": {"batch_size_prompts": 4}}}
    for arm, found in {
        COMPLETE: {"saebench": evaluations, "tree": {}},
        NO_TREE: {"saebench": evaluations},
        NO_CORE: {"saebench": other_core, "tree": {}},
        HERE: {},
    }.items():
        content = {"arm": arm._asdict(), "levels": [], **found}
        (tmp_path / "results" / f"{arm.name}.json").write_text(json.dumps(content))
    here = tmp_path / "experiment" / "saes" / HERE.name / "runner_cfg.json"
    here.parent.mkdir(parents=True)
    here.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("steps", "left_out"),
    [
        (["train"], []),
        (["train", "tree"], [NO_TREE]),
        (["evaluate"], [NO_CORE]),
        (["tree", "evaluate"], [NO_TREE, NO_CORE]),
    ],
)
def test_incomplete_saes_that_are_not_here(
    data: Path, steps: list[str], left_out: list[Arm]
) -> None:
    experiment = Experiment(data, data / "results")
    arms = [COMPLETE, NO_TREE, NO_CORE, HERE]
    assert experiment.not_here(arms, steps) == [arm.name for arm in left_out]


def test_they_are_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(data), "--arms", COMPLETE.name, NO_TREE.name]) == 0
    left_out, where = capsys.readouterr().out.splitlines()
    saes = data / "experiment" / "saes"
    assert left_out == f"left out, because {saes} does not hold them: {NO_TREE.name}"
    assert where.startswith(f"{data / 'results'} has what was found; ")


def test_results_of_another_recipe_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data / "results" / f"{COMPLETE.name}.json"
    file.write_text(file.read_text().replace('"k": 6', '"k": 7'))
    assert main(["--data", str(data), "--arms", COMPLETE.name]) == 2
    error = capsys.readouterr().err
    assert f"error: {file} is of " in error
    assert "'k': 7" in error
    assert "and arms.py now has" in error
