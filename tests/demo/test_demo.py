"""What the demo leaves, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image
from sae_lens import SAE

from sae_lens_matryoshka.demo import compare, run
from sae_lens_matryoshka.demo.report import Row, table
from sae_lens_matryoshka.runs.config import load_run_config

REPOSITORY = Path(__file__).parents[2]


def test_every_level_is_measured_and_drawn(demo_run: Path) -> None:
    rows = [Row(**row) for row in json.loads((demo_run / "results.json").read_text())["rows"]]
    assert [(row.sae, row.width) for row in rows] == [
        ("batchtopk", 1024),
        *(("matryoshka", width) for width in (32, 96, 224, 480, 1024)),
    ]
    levels = rows[1:]
    assert [row.l0_training for row in levels] == sorted(row.l0_training for row in levels)
    assert levels[-1].l0_training == pytest.approx(8, rel=0.01)
    assert all(0 < row.explained_variance < 1 for row in rows)
    assert levels[-1].explained_variance > levels[0].explained_variance
    assert (demo_run / "results.md").read_text() == table(rows) + "\n"
    assert image.imread(demo_run / "levels.png").std() > 0.1, "something is drawn"
    assert "sae-matryoshka demo" in (demo_run / "demo.txt").read_text()
    metadata = SAE.load_from_disk(demo_run / "matryoshka").cfg.metadata
    widths = metadata.training_architecture_details["matryoshka_widths"]
    assert widths == [32, 96, 224, 480, 1024]


def test_the_command_that_it_ends_with_works_in_its_folder(demo_run: Path) -> None:
    program = f"{sys.executable} -m sae_lens_matryoshka"
    done = subprocess.run(
        compare.LEVELS_COMMAND.replace("sae-matryoshka", program) + " --n-batches 1",
        shell=True,
        cwd=demo_run,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    widths = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:7]]
    assert widths == ["32", "96", "224", "480", "1024"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"out={str(tmp_path)!r} holds something other")):
        run.run_demo(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_config_file_is_the_demo_run() -> None:
    from_file = load_run_config(REPOSITORY / "configs" / "demo.yaml").to_dict()
    in_demo = compare.run_config(compare.sae_configs()[1]).to_dict()
    for cfg in (from_file, in_demo):
        del cfg["checkpoint_path"]  # the demo is too short to need any
    assert from_file == in_demo
