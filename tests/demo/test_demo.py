"""The demo: the whole of it on few tokens, in its own process, as the command runs it."""

from __future__ import annotations

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

SHORT = """
import sys
from sae_lens_matryoshka.demo import compare
whole = compare.run_config
def short(sae, seed=0):
    cfg = whole(sae, seed)
    cfg.training_tokens, cfg.lr_decay_steps = 1024 * 120, 20
    return cfg
compare.run_config = short
compare.main(0)
"""


def test_demo_trains_evaluates_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "N_TEXTS", 4000)
    monkeypatch.setattr(run, "N_HELD_OUT", 600)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    real_run = subprocess.run

    def few_tokens(command: list[str], **options):
        assert command == [sys.executable, "-m", "sae_lens_matryoshka.demo.compare", "0"]
        return real_run([sys.executable, "-c", SHORT], **options)

    monkeypatch.setattr(subprocess, "run", few_tokens)
    out = tmp_path / "demo"
    assert run.run_demo(out) == 0

    rows = [Row(**row) for row in json.loads((out / "results.json").read_text())["rows"]]
    assert [(row.sae, row.width) for row in rows] == [
        ("batchtopk", 1024),
        *(("matryoshka", width) for width in (32, 96, 224, 480, 1024)),
    ]
    levels = rows[1:]
    assert [row.l0_training for row in levels] == sorted(row.l0_training for row in levels)
    assert levels[-1].l0_training == pytest.approx(8, rel=0.01)
    assert all(0 < row.explained_variance < 1 for row in rows)
    assert levels[-1].explained_variance > levels[0].explained_variance
    assert (out / "results.md").read_text() == table(rows) + "\n"
    picture = image.imread(out / "levels.png")
    assert picture.std() > 0.1, "something is drawn"
    assert "first level" in (out / "nesting.md").read_text(), "families, or that there are none"

    sae = SAE.load_from_disk(out / "matryoshka")
    details = sae.cfg.metadata.training_architecture_details
    assert details["matryoshka_widths"] == [32, 96, 224, 480, 1024]
    assert "sae-matryoshka demo" in (out / "demo.txt").read_text()


def test_demo_spares_a_folder_that_holds_something_else(tmp_path: Path) -> None:
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
