"""The demo's own process: train the two SAEs, evaluate them and every level, report.

Runs in the demo's folder, where the model and the texts are found by their relative names.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    TrainingSAEConfig,
    run_evals,
)
from sae_lens.evals import EvalConfig
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from sae_lens_matryoshka.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.demo.corpus import documents
from sae_lens_matryoshka.demo.report import Reading, Row, draw_levels, table
from sae_lens_matryoshka.demo.run import HELD_OUT_SEED
from sae_lens_matryoshka.levels import truncate
from sae_lens_matryoshka.runner import MatryoshkaTrainingRunner

HOOK_NAME = "blocks.1.hook_resid_post"
D_IN, D_SAE, K = 128, 1024, 8
N_EVAL_BATCHES = 5


def run_config(
    sae: TrainingSAEConfig, seed: int = 0
) -> LanguageModelSAERunnerConfig[TrainingSAEConfig]:
    """The demo's training run of one SAE; `configs/demo.yaml` holds the same to train from."""
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="pythia-70m-deduped",
        hook_name=HOOK_NAME,
        dataset_path="corpus",
        streaming=False,
        is_dataset_tokenized=False,
        context_size=128,
        training_tokens=1024 * 1500,
        train_batch_size_tokens=1024,
        store_batch_size_prompts=16,
        n_batches_in_buffer=32,
        lr=1e-3,
        lr_warm_up_steps=50,
        lr_decay_steps=300,
        dead_feature_window=200,
        feature_sampling_window=500,
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=sae.architecture(),
        verbose=False,
    )


def sae_configs() -> list[TrainingSAEConfig]:
    """SAELens' BatchTopK and this package's Matryoshka SAE, of the same width and k."""
    shape: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": K}
    return [BatchTopKTrainingSAEConfig(**shape), MatryoshkaTrainingSAEConfig(**shape)]


def train(
    cfg: LanguageModelSAERunnerConfig[TrainingSAEConfig],
    model: HookedTransformer,
    corpus: Dataset,
) -> float:
    """Train one SAE with SAELens' runner and save it under its architecture's name.

    Returns:
        Seconds of the run, which include the language model's, without loading model and texts.
    """
    torch.manual_seed(cfg.seed)
    runner = MatryoshkaTrainingRunner(cfg, override_dataset=corpus, override_model=model)
    start = time.perf_counter()
    runner.run()
    return time.perf_counter() - start


def evaluate(sae: SAE[Any], model: HookedTransformer) -> dict[str, float]:
    """SAELens' evaluation of a saved SAE on the held-out texts."""
    store = ActivationsStore.from_sae(
        model, sae, dataset="held_out", streaming=False, store_batch_size_prompts=16
    )
    metrics, _ = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        EvalConfig(
            n_eval_reconstruction_batches=N_EVAL_BATCHES,
            n_eval_sparsity_variance_batches=N_EVAL_BATCHES,
            compute_ce_loss=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
    )
    return {
        "explained_variance": metrics["reconstruction_quality"]["explained_variance"],
        "ce_recovered": metrics["model_performance_preservation"]["ce_loss_score"],
        "l0": metrics["sparsity"]["l0"],
    }


@torch.no_grad()
def read_text(sae: JumpReLUSAE, widths: list[int], model: HookedTransformer, text: str) -> Reading:
    """What each level reconstructs of the activations on one text."""
    tokens = model.to_tokens(text, prepend_bos=True)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK_NAME)
    activations = cache[HOOK_NAME][0, 1:]
    distances = (activations - sae.b_dec).pow(2).sum(-1)
    missed = [(truncate(sae, w)(activations) - activations).pow(2).sum(-1) for w in widths]
    return Reading(
        tokens=[str(token) for token in model.to_str_tokens(tokens[0, 1:])],
        shares=1 - torch.stack(missed) / distances,
    )


def main(seed: int) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    start = time.perf_counter()
    model = load_model("HookedTransformer", "pythia-70m-deduped", "cpu")
    assert isinstance(model, HookedTransformer)

    corpus = load_dataset("corpus", split="train")
    assert isinstance(corpus, Dataset)
    rows: list[Row] = []
    frequencies: dict[str, torch.Tensor] = {}
    saes: dict[str, JumpReLUSAE] = {}
    for sae_cfg in sae_configs():
        name = sae_cfg.architecture()
        print(f"\nTraining {name}: d_sae {D_SAE}, k {K}", flush=True)
        seconds = train(run_config(sae_cfg, seed), model, corpus)
        frequencies[name] = 10 ** load_file(f"{name}/sparsity.safetensors")["sparsity"]
        sae = SAE.load_from_disk(name)
        assert isinstance(sae, JumpReLUSAE)
        saes[name] = sae
        widths = getattr(sae_cfg, "matryoshka_widths", [D_SAE])
        for width in tqdm(widths, desc=f"Evaluating the levels of {name}"):
            row = Row(
                sae=name,
                width=width,
                l0_training=frequencies[name][:width].sum().item(),
                seconds=seconds if width == D_SAE else None,
                **evaluate(truncate(sae, width), model),
            )
            rows.append(row)

    Path("results.json").write_text(
        json.dumps({"seed": seed, "rows": [row._asdict() for row in rows]}, indent=2)
    )
    Path("results.md").write_text(table(rows) + "\n")
    text = documents(1, seed + HELD_OUT_SEED)[0].text
    widths = [row.width for row in rows if row.sae == "matryoshka"]
    draw_levels(
        Path("levels.png"),
        rows,
        frequencies["matryoshka"],
        frequencies["batchtopk"],
        read_text(saes["matryoshka"], widths, model, text),
    )
    print(f"\n{table(rows)}\n")
    print(f"Saved in {Path.cwd()}: batchtopk/, matryoshka/, results.json, results.md, levels.png")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main(seed=int(sys.argv[1]))
