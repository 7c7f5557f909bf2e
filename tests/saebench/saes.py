"""SAEs of the demo's model to evaluate: one trained in the demo's way, and two that bracket it."""

import json
import shutil
from pathlib import Path

import torch
from datasets import load_dataset
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.demo.compare import HOOK_NAME, run_config
from sae_lens_matryoshka.demo.corpus import texts
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

MODEL_NAME = "pythia-70m-deduped"  # TransformerLens takes official names only
REPOSITORY = f"EleutherAI/{MODEL_NAME}"
D_IN, D_SAE = 128, 256
WIDTHS = [8, 24, 56, 120, 256]


def write_saes(folder: Path) -> None:
    """`trained`, `random` and `identity` in `folder`; the model is at the Hub that is set."""
    _train(folder / "trained")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, D_SAE, D_IN, generator=generator)
    rows /= rows.norm(dim=-1, keepdim=True)
    _write(folder / "random", rows[0], rows[1])
    eye = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    _write(folder / "identity", eye, eye)


def _train(folder: Path) -> None:
    shape = {"d_in": D_IN, "d_sae": D_SAE, "k": 8}
    cfg = run_config(MatryoshkaTrainingSAEConfig(**shape, matryoshka_widths=WIDTHS))
    cfg.model_name = MODEL_NAME
    cfg.training_tokens, cfg.lr_decay_steps = 1024 * 400, 100
    cfg.output_path = str(folder)
    corpus = folder.parent / "corpus"
    corpus.mkdir(parents=True)
    rows = [{"text": text} for text in texts(8000, seed=0)]
    (corpus / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    torch.manual_seed(0)
    MatryoshkaTrainingRunner(
        cfg,
        override_dataset=load_dataset(str(corpus), split="train"),
        override_model=load_model("HookedTransformer", MODEL_NAME, "cpu"),
    ).run()
    shutil.rmtree(corpus)


def _write(folder: Path, encoder_rows: torch.Tensor, W_dec: torch.Tensor) -> None:
    metadata = SAEMetadata(model_name=MODEL_NAME, hook_name=HOOK_NAME, prepend_bos=True)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=len(W_dec), metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(encoder_rows.T)
        sae.threshold.zero_()
    sae.save_model(folder)
