"""What a demo leaves: SAEs, their levels measured and drawn, SAEBench's scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image
from sae_lens import SAE

from sae_lens_matryoshka.demo import compare
from sae_lens_matryoshka.demo.report import Row, table


def test_every_level_is_measured_and_drawn(demo_run: Path) -> None:
    rows = [Row(**row) for row in json.loads((demo_run / "results.json").read_text())["rows"]]
    assert [(row.sae, row.width) for row in rows] == [
        *(("matryoshka", width) for width in (32, 96, 224, 480, 1024)),
        ("batchtopk", 1024),
    ]
    levels = rows[:-1]
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


def test_its_summary_is_short_and_names_files_that_are_there(demo_run: Path) -> None:
    text = (demo_run / "summary.txt").read_text()
    trained, opened, command = text.split("\n\n")
    assert trained.startswith("Trained: two SAEs of 1,024 latents")
    assert opened.startswith("Open:\n")
    files = [Path(line.strip().partition(": ")[0]) for line in opened.splitlines()[1:]]
    assert {"index.html", "levels.png", "report.html"} <= {file.name for file in files}
    assert all(file.is_file() for file in files)
    assert command.startswith("Try next, in ")
    assert "HF_HUB_OFFLINE=1" in command
    assert text.count("\n") <= 30


def test_the_command_that_it_ends_with_works_in_its_folder(demo_run: Path) -> None:
    program = f"{sys.executable} -m sae_lens_matryoshka"
    done = subprocess.run(
        compare.LEVELS_COMMAND.replace("sae-matryoshka", program) + " --n-batches 1",
        shell=True,
        cwd=demo_run,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    widths = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:7]]
    assert widths == ["32", "96", "224", "480", "1024"]


def test_both_saes_and_every_level(demo_run: Path) -> None:
    summary = json.loads((demo_run / "saebench" / "summary.json").read_text())
    assert summary["not_run"] == []
    assert summary["model_name"] == "tiny-gpt-neox"
    assert {score["evaluation"] for score in summary["scores"]} == {"sparse_probing", "core"}
    widths = (32, 96, 224, 480)
    levels = [*(f"matryoshka, first {width}" for width in widths), "matryoshka"]
    assert [sae["title"] for sae in summary["saes"]] == [*levels, "batchtopk"]
    assert [sae["width"] for sae in summary["saes"]] == [*widths, 1024, 1024]
    scores = {(s["sae"], s["label"]): s["mean"] for s in summary["scores"]}
    explained = [scores[title, "variance explained"] for title in levels]
    assert explained == sorted(explained)
    top_1 = "sparse probing, top 1"
    assert scores[levels[0], top_1] < scores["matryoshka", top_1]
    assert "tiny-gpt-neox" in (demo_run / "saebench" / "report.html").read_text()
