"""SAEBench's own functions take what this package trains, loads and truncates, without `eval`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: jaxtyping reads JAXTYPING_DISABLE when SAEBench is imported.
SCRIPT = """
import json, sys
import torch
from sae_bench.evals.core.main import multiple_evals
from sae_bench.evals.meta_structure.main import MetaStructureEvalConfig
from sae_bench.evals.meta_structure.main import run_eval as run_meta_structure
from sae_bench.evals.sparse_probing.main import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.main import run_eval as run_sparse_probing
from sae_bench.sae_bench_utils.general_utils import check_decoder_norms
from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka import load_sae, truncate

loaded = load_sae(sys.argv[1])
assert check_decoder_norms(loaded.W_dec.data)
torch.manual_seed(0)
cfg = MatryoshkaTrainingSAEConfig(
    d_in=128, d_sae=256, k=8, matryoshka_widths=[8, 24, 56, 120, 256], metadata=loaded.cfg.metadata
)
training = MatryoshkaTrainingSAE(cfg)
with torch.no_grad():
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(training, name).copy_(getattr(loaded, name))
    training.topk_threshold.fill_(loaded.threshold.mean())
saes = [
    ("training", training),
    ("loaded", loaded),
    ("level", truncate(loaded, 24)),
    ("level of training", truncate(training, 24)),
]
config = SparseProbingEvalConfig(
    model_name="pythia-70m-deduped",
    dataset_names=["fancyzhx/ag_news"],
    probe_train_set_size=200,
    probe_test_set_size=200,
    llm_batch_size=128,
    llm_dtype="float32",
)
run_sparse_probing(config, saes, "cpu", "probing", artifacts_path="kept")
multiple_evals(
    saes, 2, 2, output_folder="core", device="cpu",
    compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
)
run_meta_structure(MetaStructureEvalConfig(train_steps=20), saes, "cpu", "meta")
"""


@pytest.fixture(scope="module")
def results(saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("itself")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(saes / "trained")],
        cwd=folder,
        env={**os.environ, "JAXTYPING_DISABLE": "1"},
        capture_output=True,
        check=True,
    )
    return folder


def metrics(results: Path, evaluation: str, name: str) -> dict[str, dict[str, float]]:
    file = results / evaluation / f"{name}_custom_sae_eval_results.json"
    return json.loads(file.read_text())["eval_result_metrics"]


def test_sparse_probing(results: Path) -> None:
    top_1 = {
        name: metrics(results, "probing", name)["sae"]["sae_top_1_test_accuracy"]
        for name in ("training", "loaded", "level", "level of training")
    }
    assert top_1["level"] == top_1["level of training"] > 0.8
    assert min(top_1["training"], top_1["loaded"]) > 0.9


def test_core(results: Path) -> None:
    explained = {
        name: metrics(results, "core", name)["reconstruction_quality"]["explained_variance"]
        for name in ("training", "loaded", "level", "level of training")
    }
    assert explained["level of training"] == pytest.approx(explained["level"], abs=1e-6)
    assert explained["level"] < explained["loaded"] - 0.1
    assert explained["training"] == pytest.approx(explained["loaded"], abs=0.02)
    # A batch of the training SAE keeps k per token, the saved one what passes the threshold.
    assert metrics(results, "core", "training")["sparsity"]["l0"] == pytest.approx(8, rel=0.05)


def test_meta_structure(results: Path) -> None:
    for name in ("training", "loaded", "level", "level of training"):
        found = metrics(results, "meta", name)["meta_structure"]
        assert 0 < found["decoder_fraction_variance_explained"] < 1
