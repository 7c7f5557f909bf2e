"""The last part of the demo: SAEBench on both of its SAEs, offline, in its folder."""

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


def test_both_saes_and_every_level(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    summary = json.loads((tmp_path / "saebench" / "summary.json").read_text())
    assert summary["not_run"] == []
    titles = [sae["title"] for sae in summary["saes"]]
    widths = (8, 24, 56, 120)
    levels = [*(f"matryoshka, first {width}" for width in widths), "matryoshka"]
    assert titles == [*levels, "batchtopk"]
    scores = {(s["sae"], s["label"]): s["mean"] for s in summary["scores"]}
    explained = [scores[title, "variance explained"] for title in titles]
    assert explained == sorted(explained)
    assert (
        scores["matryoshka, first 8", "sparse probing, top 1"]
        < scores["matryoshka", "sparse probing, top 1"]
    )
    assert "| batchtopk | 256 |" in process.stdout
    assert (tmp_path / "saebench" / "report.html").exists()
