"""Which steps of the experiment of examples/smollm2 run; tests/saebench runs them."""

import json
from pathlib import Path

import pytest

from examples.smollm2.arms import Arm
from examples.smollm2.run import SETTINGS, main
from sae_lens_matryoshka.demo.smollm2 import MODEL

TRAINED, EVALUATED = Arm("batchtopk", 6, seed=0), Arm("batchtopk", 6, seed=1)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The results of two SAEs that are not in the folder; those of the second are complete."""
    for name in (MODEL, "texts/train", "texts/held_out", "results"):
        (tmp_path / name).mkdir(parents=True)
    evaluations = {name: {"settings": settings} for name, settings in SETTINGS.items()}
    for arm, more in (
        (TRAINED, {"saebench": {**evaluations, "core": {"settings": {}}}}),
        (EVALUATED, {"saebench": evaluations, "tree": {}}),
    ):
        content = {"arm": arm._asdict(), "levels": [], **more}
        (tmp_path / "results" / f"{arm.name}.json").write_text(json.dumps(content))
    return ["--data", str(tmp_path), "--arms", TRAINED.name, EVALUATED.name]


def test_saes_that_were_trained_elsewhere_are_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    left_out, where = capsys.readouterr().out.splitlines()
    saes = tmp_path / "experiment" / "saes"
    assert left_out == f"no trees or evaluations, since not in {saes}: {TRAINED.name}"
    assert where.startswith(f"{tmp_path / 'results'} has what was found; ")
    assert main([*arguments, "--steps", "train"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_results_of_another_recipe_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / f"{TRAINED.name}.json"
    file.write_text(file.read_text().replace('"k": 6', '"k": 7'))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"error: {file} is of " in error
    assert "'k': 7" in error
    assert "and arms.py now has" in error
