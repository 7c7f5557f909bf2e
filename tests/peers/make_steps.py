"""A few training steps of dictionary_learning's Matryoshka trainer, for tests/test_presets.py.

    PYTHONPATH=FOLDER python tests/peers/make_steps.py OUT

FOLDER is where requirements.txt is installed. OUT/DTYPE.pt gets what the trainer began with
(`start`), its activations (`batches`: steps, tokens, d_in) and what it held after each step
(`after`), under the names that the weights have in SAELens as well.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType

import torch

D_IN, GROUP_SIZES, N_TOKENS, N_STEPS = 16, [4, 12, 48], 64, 20
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def train(dtype: torch.dtype) -> dict[str, object]:
    # The annotations of functions that are not called here are all that needs nnsight.
    sys.modules["nnsight"] = ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    torch.manual_seed(0)
    batches = torch.rand(N_STEPS, N_TOKENS, 24, dtype=dtype).pow(4) @ torch.randn(24, D_IN).to(
        dtype
    )
    trainer = MatryoshkaBatchTopKTrainer(
        steps=N_STEPS,
        activation_dim=D_IN,
        dict_size=sum(GROUP_SIZES),
        k=4,
        layer=0,
        lm_name="none",
        group_fractions=[size / sum(GROUP_SIZES) for size in GROUP_SIZES],
        lr=3e-3,
        warmup_steps=0,
        threshold_start_step=5,
        device="cpu",
    )
    sae = trainer.ae.to(dtype)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        # so that all that is trained is seen, an encoder that is not the decoder's transpose
        sae.W_enc.add_(0.05 * torch.randn_like(sae.W_enc))
        sae.b_dec.copy_(trainer.geometric_median(batches[0]))  # as the first step sets it anyway
    start = {name: tensor.clone() for name, tensor in sae.state_dict().items() if name in NAMES}
    after = []
    for step, batch in enumerate(batches):
        trainer.update(step, batch)
        after.append({name: tensor.clone() for name, tensor in sae.state_dict().items()})
    return {
        "start": start,
        "batches": batches,
        "after": {name: torch.stack([state[name] for state in after]) for name in NAMES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    out = parser.parse_args().out
    for name in ("float32", "float64"):
        torch.save(train(getattr(torch, name)), out / f"{name}.pt")


if __name__ == "__main__":
    main()
