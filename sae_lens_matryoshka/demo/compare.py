"""The demo's own process: train the two SAEs, evaluate them and every level, report.

Runs in the demo's folder, where the model and the texts are found by their relative names.
"""

from __future__ import annotations

import json
import logging
import shutil
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
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    TrainingSAEConfig,
)
from sae_lens.load_model import load_model
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from sae_lens_matryoshka.demo.corpus import documents
from sae_lens_matryoshka.demo.nesting import describe, families
from sae_lens_matryoshka.demo.report import Reading, Row, draw_levels, table
from sae_lens_matryoshka.demo.run import HELD_OUT_SEED
from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import decode_levels, set_widths, widths_of
from sae_lens_matryoshka.levels.stats import LevelStats, measure_levels_in_model
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.saebench.evaluations import is_installed
from sae_lens_matryoshka.saebench.report import write_report
from sae_lens_matryoshka.saebench.suite import plan_suite, run_suite
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig

HOOK_NAME = "blocks.1.hook_resid_post"
D_IN, D_SAE, K = 128, 1024, 8
N_EVAL_BATCHES = 57  # of 2,048 tokens: all held-out texts, in their proportions
N_NESTING_BATCHES = 24
SAEBENCH = Path("saebench")
# SAEBench's own, but for the data: labelled documents of the demo in the shape of AG News.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "absorption": {},
    "sparse_probing": {
        "dataset_names": ["fancyzhx/ag_news"],
        "probe_train_set_size": 1000,
        "probe_test_set_size": 400,
    },
    "core": {
        "dataset": "held_out",
        "n_eval_reconstruction_batches": 8,
        "n_eval_sparsity_variance_batches": 16,
    },
}


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


def evaluate(sae: SAE[Any], model: HookedTransformer) -> list[LevelStats]:
    """The levels of a saved SAE on the held-out texts."""
    store = ActivationsStore.from_sae(
        model, sae, dataset="held_out", streaming=False, store_batch_size_prompts=16
    )
    return measure_levels_in_model(sae, model, store, N_EVAL_BATCHES)


@torch.no_grad()
def read_text(sae: SAE[Any], model: HookedTransformer, text: str) -> Reading:
    """What each level reconstructs of the activations on one text."""
    tokens = model.to_tokens(text, prepend_bos=True)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK_NAME)
    activations = cache[HOOK_NAME][0, 1:]
    distances = (activations - sae.b_dec).pow(2).sum(-1)
    missed = (decode_levels(sae, sae.encode(activations)) - activations).pow(2).sum(-1)
    return Reading(
        tokens=[str(token) for token in model.to_str_tokens(tokens[0, 1:])],
        shares=1 - missed / distances,
    )


@torch.no_grad()
def tell_nesting(
    sae: SAE[Any], baseline: SAE[Any], model: HookedTransformer, n_batches: int
) -> str:
    """Latents of the first level with those that specialise them, in words, on held-out texts."""
    store = ActivationsStore.from_sae(
        model, sae, dataset="held_out", streaming=False, store_batch_size_prompts=16
    )
    batches = [store.get_batch_tokens() for _ in range(n_batches)]
    x = torch.cat([store.get_activations(tokens).flatten(0, -2) for tokens in batches])
    tokens = model.to_str_tokens(torch.cat(batches).flatten())
    return describe(
        families(sae.encode(x), baseline.encode(x), list(map(str, tokens)), widths_of(sae))
    )


def evaluate_with_saebench() -> str:
    """Absorption, sparse probing and core of both SAEs and every level, by SAEBench itself.

    Returns:
        The table, which is in `saebench/` as well.
    """
    shutil.rmtree(SAEBENCH, ignore_errors=True)
    plan = plan_suite(
        [["matryoshka"]],
        SAEBENCH,
        against=[["batchtopk"]],
        evaluations=list(EVALUATIONS),
        n_seeds=1,
        settings=EVALUATIONS,
    )
    return write_report(run_suite(plan), SAEBENCH)


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
    saes: dict[str, SAE[Any]] = {}
    for sae_cfg in sae_configs():
        name = sae_cfg.architecture()
        print(f"\nTraining {name}: d_sae {D_SAE}, k {K}", flush=True)
        seconds = train(run_config(sae_cfg, seed), model, corpus)
        frequencies[name] = 10 ** load_file(f"{name}/sparsity.safetensors")["sparsity"]
        sae = saes[name] = load_sae(name)
        if not isinstance(sae_cfg, MatryoshkaTrainingSAEConfig):
            set_widths(sae, [D_SAE])
        print(f"Evaluating the levels of {name}", flush=True)
        for level in evaluate(sae, model):
            measured = level._asdict()
            row = Row(
                sae=name,
                width=level.width,
                l0_training=frequencies[name][: level.width].sum().item(),
                seconds=seconds if level.width == D_SAE else None,
                **{name: measured[name] for name in ("l0", "explained_variance", "ce_recovered")},
            )
            rows.append(row)

    Path("results.json").write_text(
        json.dumps({"seed": seed, "rows": [row._asdict() for row in rows]}, indent=2)
    )
    Path("results.md").write_text(table(rows) + "\n")
    text = documents(1, seed + HELD_OUT_SEED)[0].text
    draw_levels(
        Path("levels.png"),
        rows,
        frequencies["matryoshka"],
        frequencies["batchtopk"],
        read_text(saes["matryoshka"], model, text),
    )
    print(f"\n{table(rows)}\n")
    nesting = tell_nesting(saes["matryoshka"], saes["batchtopk"], model, N_NESTING_BATCHES)
    Path("nesting.md").write_text(nesting + "\n")
    print(f"What is inside what, on held-out texts:\n\n{nesting}\n")
    files = "batchtopk/, matryoshka/, results.json, results.md, levels.png, nesting.md"
    if is_installed():
        print(
            "Evaluating both and every level with SAEBench, whose core reads fewer of the held-out "
            "texts than the table above",
            flush=True,
        )
        print(f"\n{evaluate_with_saebench()}\n")
        files += f", {SAEBENCH}/report.html"
    else:
        print("For absorption and sparse probing: pip install 'sae-lens-matryoshka[eval]'.")
    print(f"Saved in {Path.cwd()}: {files}")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main(seed=int(sys.argv[1]))
