"""The last part of the demo: SAEBench on both of its SAEs, offline, in its folder.

DEMO_RUN names the folder of a finished demo; without it a short evaluation runs here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lens_matryoshka.demo import run

SMALL = """
from sae_lens_matryoshka.demo import compare
compare.EVALUATIONS = {
    "sparse_probing": {
        **compare.EVALUATIONS["sparse_probing"],
        "probe_train_set_size": 200,
        "probe_test_set_size": 100,
    },
    "core": {
        "dataset": "held_out",
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 2,
    },
}
print(compare.evaluate_with_saebench())
"""


@pytest.fixture
def results(saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SAEBench's results on the demo's SAEs."""
    if "DEMO_RUN" in os.environ:
        return Path(os.environ["DEMO_RUN"], "saebench")
    monkeypatch.setattr(run, "N_TEXTS", 400)
    monkeypatch.setattr(run, "N_HELD_OUT", 400)
    monkeypatch.setattr(run, "N_LABELLED", 1200)
    run.write_model_and_texts(tmp_path, seed=0)
    shutil.copytree(saes / "trained", tmp_path / "matryoshka")
    shutil.copytree(saes / "identity", tmp_path / "batchtopk")
    process = subprocess.run(
        [sys.executable, "-c", SMALL],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| batchtopk | 256 |" in process.stdout
    return tmp_path / "saebench"


def test_both_saes_and_every_level(results: Path) -> None:
    summary = json.loads((results / "summary.json").read_text())
    assert summary["not_run"] == []
    titles = [sae["title"] for sae in summary["saes"]]
    widths = [sae["width"] for sae in summary["saes"][:4]]
    levels = [*(f"matryoshka, first {width}" for width in widths), "matryoshka"]
    assert widths == sorted(set(widths))
    assert titles == [*levels, "batchtopk"]
    scores = {(s["sae"], s["label"]): s["mean"] for s in summary["scores"]}
    explained = [scores[title, "variance explained"] for title in levels]
    assert explained == sorted(explained)
    assert (
        scores[levels[0], "sparse probing, top 1"] < scores["matryoshka", "sparse probing, top 1"]
    )
    assert (results / "report.html").exists()
