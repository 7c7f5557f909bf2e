"""The demo's own process: show the shipped SAE, train two others, evaluate every level, and report.

What takes least and shows most comes first: the SAE of a real model, `real_text.py`.

It runs in the demo's folder, where the model and the texts are found by relative names.
"""

import io
import json
import logging
import shlex
import shutil
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from jaxtyping import Float
from sae_lens import (
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
from sae_lens_matryoshka.demo.page import write_demo_page
from sae_lens_matryoshka.demo.real_text import show_shipped_sae
from sae_lens_matryoshka.demo.reconstruction import reconstruct, run_on_text
from sae_lens_matryoshka.demo.report import (
    Row,
    draw_levels,
    summary,
    table,
)
from sae_lens_matryoshka.demo.run import HELD_OUT_SEED, MODEL_NAME, write_model_and_texts
from sae_lens_matryoshka.demo.stages import stage
from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.stats import measure_levels_in_model
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.saebench.evaluations import is_installed
from sae_lens_matryoshka.saebench.report import write_report
from sae_lens_matryoshka.saebench.suite import plan_suite, run_suite
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.util.output import tidy_output

HOOK_NAME = "blocks.1.hook_resid_post"
D_IN, D_SAE, K = 128, 1024, 8
N_EVAL_BATCHES = 30  # of 2,048 tokens: half of the held-out texts
SAEBENCH = Path("saebench")
PAGE = Path("page")  # of the shipped SAE, or without its model of `matryoshka`
N_PAGE_TOKENS = 100_000
_MEASURED = ("l0", "explained_variance", "ce_recovered")
PACKAGE = "sae_lens_matryoshka"
LEVELS_COMMAND = "HF_HUB_OFFLINE=1 sae-matryoshka levels matryoshka --dataset held_out"
# SAEBench's defaults, except for datasets and sizes. No absorption: see docs/results/demo.md.
EVALUATIONS: dict[str, dict[str, Any]] = {
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
    """The demo's training run of one SAE; `configs/demo.yaml` is the same as a file."""
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=MODEL_NAME,
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
    """This package's Matryoshka SAE and SAELens' BatchTopK, of the same width and k."""
    shape: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": K}
    return [MatryoshkaTrainingSAEConfig(**shape), BatchTopKTrainingSAEConfig(**shape)]


def train_and_measure(
    cfg: LanguageModelSAERunnerConfig[TrainingSAEConfig], model: HookedTransformer, corpus: Dataset
) -> tuple[list[Row], Float[torch.Tensor, " d_sae"]]:
    """Train an SAE, save it under its architecture's name and measure its levels on held-out texts.

    Returns:
        A row for each level, and the share of tokens on which each latent fired in training.
    """
    name = cfg.sae.architecture()
    stage(
        f"Training {name}: {D_SAE:,} latents, of which {K} fire on a token, on "
        f"{cfg.training_tokens:,} activations of a model of three layers"
    )
    torch.manual_seed(cfg.seed)
    runner = MatryoshkaTrainingRunner(cfg, override_dataset=corpus, override_model=model)
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start

    stage(f"Measuring {name} on texts that it has not seen")
    frequencies = 10 ** load_file(f"{name}/sparsity.safetensors")["sparsity"]
    widths = getattr(cfg.sae, "matryoshka_widths", [D_SAE])
    sae = load_sae(name, matryoshka_widths=widths)
    store = ActivationsStore.from_sae(
        model, sae, dataset="held_out", streaming=False, store_batch_size_prompts=16
    )
    rows = [
        Row(
            sae=name,
            width=level.width,
            l0_training=frequencies[: level.width].sum().item(),
            seconds=seconds if level.width == D_SAE else None,
            **{field: getattr(level, field) for field in _MEASURED},
        )
        for level in measure_levels_in_model(sae, model, store, N_EVAL_BATCHES)
    ]
    return rows, frequencies


def evaluate_with_saebench() -> str:
    """Run SAEBench's sparse probing and core on both SAEs and every level.

    Returns:
        The table, which `saebench/` has as well.
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
    tidy_output()
    levels = show_shipped_sae(Path("smollm2_levels.png"), PAGE)

    write_model_and_texts(Path(), seed)
    with redirect_stdout(io.StringIO()):  # TransformerLens prints
        model = load_model("HookedTransformer", MODEL_NAME, "cpu")
    assert isinstance(model, HookedTransformer)
    corpus = load_dataset("corpus", split="train")
    assert isinstance(corpus, Dataset)
    rows: list[Row] = []
    frequencies: dict[str, torch.Tensor] = {}
    for sae_cfg in sae_configs():
        name = sae_cfg.architecture()
        measured, frequencies[name] = train_and_measure(run_config(sae_cfg, seed), model, corpus)
        print(f"\n{table(measured)}")
        rows += measured

    results = {"seed": seed, "rows": [row._asdict() for row in rows]}
    Path("results.json").write_text(json.dumps(results, indent=2))
    Path("results.md").write_text(table(rows) + "\n")
    text = documents(1, seed + HELD_OUT_SEED)[0].text
    sae = load_sae("matryoshka")
    reconstruction = reconstruct(sae, run_on_text(sae, model, text))
    draw_levels(Path("levels.png"), rows, frequencies, reconstruction)
    if levels is None:
        stage("Which latents of matryoshka specialise which")
        name = "The demo's matryoshka SAE"
        lines = write_demo_page(PAGE, sae, model, "held_out", N_PAGE_TOKENS, name)
        print("\n".join(["", *lines]))
    scores = None
    if is_installed():
        stage("SAEBench on both SAEs and every level: sparse probing, and core on fewer texts")
        scores = evaluate_with_saebench()
        print(f"\n{scores}")

    here = Path.cwd()
    opened = {
        "page/index.html": "the tree of latents, in a browser",
        "smollm2_levels.png": levels and "each token of four sentences, level by level",
        "levels.png": "the levels of the SAE that was trained",
        "saebench/report.html": scores and "SAEBench's scores",
    }
    lines = [
        summary(rows, levels),
        "\nOpen:",
        *(f"  {here / name}: {what}" for name, what in opened.items() if what),
        f"\nTry next, in {shlex.quote(str(here))}:",
        *(f"  {command}" for command in (LEVELS_COMMAND, "sae-matryoshka train --help")),
    ]
    if scores is None:
        lines.append("For sparse probing: pip install 'sae-lens-matryoshka[eval]'.")
    text = "\n".join(lines)
    if shutil.which("sae-matryoshka") is None:  # the environment is not activated
        text = text.replace(" sae-matryoshka ", f" {shlex.quote(sys.executable)} -m {PACKAGE} ")
    Path("summary.txt").write_text(f"{text}\n")
    stage("Done")
    print(f"\n{text}")


if __name__ == "__main__":
    main(seed=int(sys.argv[1]))
