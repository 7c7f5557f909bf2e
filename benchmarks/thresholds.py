"""How far the L0 of a saved SAE is from the k that it was trained with, on held-out activations.

    HF_HUB_OFFLINE=1 python benchmarks/thresholds.py --out docs/benchmarks/thresholds.json

Trains on the demo's model and, at some steps, compares three thresholds for the weights of that
step: SAELens' moving average, that average without its start from 0, and what this package saves.
Each row is one run and one step; the error is L0 / k − 1, in per cent.
"""

import json
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import records
import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HUB_OFFLINE
from runner_throughput import demo_model
from sae_lens import ActivationsStore
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer
from typing_extensions import override

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.demo.compare import D_IN, D_SAE, run_config
from sae_lens_matryoshka.demo.corpus import texts
from sae_lens_matryoshka.demo.run import HELD_OUT_SEED, N_HELD_OUT, N_TEXTS
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.util.markdown import markdown_table

_N_BATCHES = 57  # of 2,048 tokens: every held-out text
STEPS = (10, 30, 100, 300, 1000, 1200, 1500)
RUNS: list[dict[str, Any]] = [
    {"k": 8},
    {"k": 8, "normalize_activations": "expected_average_only_in"},
    {"k": 1.25},
    {"k": 32},
]
TITLES = {
    "moving_average": "moving average",
    "without_start": "without its start",
    "ours": "ours",
}


class MeasuringRunner(MatryoshkaTrainingRunner):
    """Compares the thresholds at `STEPS`."""

    held_out: torch.Tensor
    rows: list[dict[str, Any]]

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[TrainingSAE[Any], Any]
    ) -> TrainingSAE[Any]:
        self.rows, compute_step = [], trainer.step

        def step(batch: torch.Tensor) -> Any:
            output = compute_step(batch)
            n_steps = trainer.n_training_steps + 1
            if n_steps in STEPS:
                self.rows.append({"step": n_steps, **self.errors(trainer, n_steps)})
            return output

        trainer.step = step
        return super().run_trainer_with_interruption_handling(trainer)

    @torch.no_grad()
    def errors(self, trainer: SAETrainer[TrainingSAE[Any], Any], n_steps: int) -> dict[str, float]:
        sae: Any = trainer.sae
        x = trainer.activation_scaler(self.held_out) - sae.b_dec
        scores = (x @ sae.W_enc + sae.b_enc).relu() * sae.W_dec.norm(dim=-1)
        state_dict = sae.state_dict()
        sae.process_state_dict_for_saving_inference(state_dict)
        average = sae.topk_threshold.item()
        thresholds = {
            "moving_average": average,
            "without_start": average / (1 - (1 - sae.cfg.topk_threshold_lr) ** n_steps),
            "ours": state_dict["threshold"][0].item(),
        }
        return {
            name: 100 * ((scores > threshold).sum().item() / len(scores) / sae.cfg.k - 1)
            for name, threshold in thresholds.items()
        }


def measure(options: dict[str, Any], model: HookedTransformer) -> list[dict[str, Any]]:
    """One run of the demo's length, compared at `STEPS`."""
    corpus = Dataset.from_dict({"text": texts(N_TEXTS, seed=0)})
    held_out = Dataset.from_dict({"text": texts(N_HELD_OUT, seed=HELD_OUT_SEED)})
    cfg = run_config(MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **options))
    cfg = replace(cfg, output_path=None, n_batches_for_norm_estimate=50)
    torch.manual_seed(cfg.seed)
    runner = MeasuringRunner(cfg, override_dataset=corpus, override_model=model)
    store = ActivationsStore.from_config(model, cfg, override_dataset=held_out)
    batches = [store.get_activations(store.get_batch_tokens()) for _ in range(_N_BATCHES)]
    runner.held_out = torch.cat(batches).reshape(-1, D_IN)
    runner.run()
    return [{**options, **row} for row in runner.rows]


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    if not HF_HUB_OFFLINE:
        parser.error("set HF_HUB_OFFLINE=1: the model is a local one under an official name")
    records.silence_libraries()
    model = demo_model("cpu")
    rows = [row for options in RUNS for row in measure(options, model)]
    cells = [
        [
            str(row["k"]),
            row.get("normalize_activations", "none"),
            str(row["step"]),
            *(f"{row[name]:+.1f} %" for name in TITLES),
        ]
        for row in rows
    ]
    titles = ["k", "normalization", "step", *TITLES.values()]
    print("\n" + markdown_table(titles, cells, n_text=2))
    if out:
        out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
