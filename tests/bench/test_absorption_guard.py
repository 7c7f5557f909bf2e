"""SAEBench's own absorption evaluation accepts the demo model: all 26 letters pass its guard.

Run where sae-bench is installed: `pytest tests/bench`.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the libraries below are imported

import torch
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka.demo import corpus

MODEL_NAME = "pythia-70m-deduped"  # TransformerLens takes official names only
LAYER, D_IN, D_SAE = 1, 128, 64


def random_sae() -> JumpReLUSAE:
    """An untrained SAE that reads the demo model: the guard looks at the model, not at the SAE."""
    metadata = SAEMetadata(
        model_name=MODEL_NAME, hook_name=f"blocks.{LAYER}.hook_resid_post", prepend_bos=True
    )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, metadata=metadata))
    torch.nn.init.normal_(sae.W_dec)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.clone() / D_IN**0.5  # small activations: sklearn converges
    return sae


def test_all_letters_pass_the_guard(tmp_path, monkeypatch):
    torch.manual_seed(0)
    # transformers takes an existing relative folder before it asks the Hub
    (tmp_path / "EleutherAI").mkdir()
    model_dir = Path(corpus.__file__).with_name("model")
    (tmp_path / "EleutherAI" / MODEL_NAME).symlink_to(model_dir, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    # By default artifacts go into the installed package, where a later model would find its probe.
    for name, folders in {
        "run_k_sparse_probing_experiment": {"experiment_dir": "k_sparse", "probes_dir": "probes"},
        "run_feature_absortion_experiment": {
            "experiment_dir": "absorption",
            "sparse_probing_experiment_dir": "k_sparse",
            "probes_dir": "probes",
        },
    }.items():
        folders = {key: tmp_path / folder for key, folder in folders.items()}
        monkeypatch.setattr(absorption, name, partial(getattr(absorption, name), **folders))

    config = AbsorptionEvalConfig(
        model_name=MODEL_NAME,
        max_k_value=2,  # k-sparse probes describe the SAE, and this one is random
        k_sparse_probe_num_epochs=5,
        k_sparse_probe_batch_size=256,
        llm_batch_size=128,
    )
    results = absorption.run_eval(config, [("random", random_sae())], "cpu", str(tmp_path))

    (probes,) = (tmp_path / "artifacts" / "absorption").glob("*_k_sparse_probing.json")
    f1 = {row["letter"]: row["f1_probe"] for row in json.loads(probes.read_text())}
    assert len(f1) == 26
    assert min(f1.values()) > config.min_GT_probe_f1, f1
    assert sum(f1.values()) / 26 > 0.9, f1
    (result,) = results.values()
    assert len(result["eval_result_details"]) == 26
