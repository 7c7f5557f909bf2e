"""Checkpoints in old formats, written by the libraries that the formats come from.

    PYTHONPATH=FOLDER python tests/peers/make_checkpoints.py OUT

FOLDER is where requirements.txt is installed. OUT/saelens_5 and OUT/dictionary_learning get a
checkpoint each and, beside it, what its own library computes with it: `feature_acts.npy` (tokens,
latents) of `activations.npy` (tokens, d_in), and `reconstructions.npy` (groups, tokens, d_in) from
the first group of latents alone, the first two and so on.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

D_IN, GROUP_SIZES, N_TOKENS = 16, [4, 12, 48], 32
D_SAE, LAYER = sum(GROUP_SIZES), 12


def write_computed(
    folder: Path,
    peer: ModuleType,
    activations: torch.Tensor,
    feature_acts: torch.Tensor,
    reconstructions: Sequence[torch.Tensor],
) -> None:
    """What the library computed, and in which version, beside its checkpoint."""
    np.save(folder / "activations.npy", activations.numpy())
    np.save(folder / "feature_acts.npy", feature_acts.numpy())
    np.save(folder / "reconstructions.npy", torch.stack(list(reconstructions)).numpy())
    said = {"package": peer.__name__.replace("_", "-"), "version": peer.__version__}
    (folder / "peer.json").write_text(json.dumps(said) + "\n")


def write_saelens_5(folder: Path) -> None:
    """A JumpReLU SAE as SAELens 5 saves it from training; its weights are random."""
    import sae_lens

    if not sae_lens.__version__.startswith("5."):
        sys.exit(f"SAELens {sae_lens.__version__} was imported: is requirements.txt on PYTHONPATH?")
    from sae_lens import SAE, LanguageModelSAERunnerConfig, TrainingSAE, TrainingSAEConfig

    run = LanguageModelSAERunnerConfig(
        architecture="jumprelu",
        model_name="gemma-2-2b",
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        hook_layer=LAYER,
        d_in=D_IN,
        d_sae=D_SAE,
        expansion_factor=None,
        apply_b_dec_to_input=True,
        dataset_path="monology/pile-uncopyrighted",
        context_size=1024,
        device="cpu",
        log_to_wandb=False,
        wandb_id="unused",  # without one it calls a function that newer wandb lacks
    )
    training_sae = TrainingSAE(TrainingSAEConfig.from_sae_runner_config(run))
    with torch.no_grad():
        training_sae.W_enc.normal_(std=D_IN**-0.5)
        training_sae.b_enc.normal_(std=0.1)
        training_sae.b_dec.normal_()
        training_sae.log_threshold.uniform_(-2, 0)  # thresholds from 0.14 to 1
    training_sae.save_model(folder)

    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        activations = 2 * torch.randn(N_TOKENS, D_IN)
        feature_acts = sae.encode(activations)
        kept = [torch.arange(D_SAE) < width for width in np.cumsum(GROUP_SIZES)]
        reconstructions = [sae.decode(feature_acts * keep) for keep in kept]
    write_computed(folder, sae_lens, activations, feature_acts, reconstructions)


def write_dictionary_learning(folder: Path) -> None:
    """A Matryoshka BatchTopK SAE as dictionary_learning trains and saves it."""
    # The annotations of functions that are not called here are all that needs nnsight.
    sys.modules["nnsight"] = ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object
    import dictionary_learning
    from dictionary_learning.trainers.matryoshka_batch_top_k import (
        MatryoshkaBatchTopKSAE,
        MatryoshkaBatchTopKTrainer,
    )
    from dictionary_learning.training import trainSAE

    mean, basis = torch.randn(D_IN), torch.randn(D_IN // 2, D_IN)

    class RandomBuffer(dictionary_learning.ActivationBuffer):
        """Its buffer of a model's activations, filled with random ones of low rank instead."""

        def refresh(self) -> None:
            codes = torch.randn(self.activation_buffer_size, len(basis))
            self.activations = mean + codes @ basis
            self.read = torch.zeros(len(codes), dtype=torch.bool)

    buffer = RandomBuffer(
        data=iter(()),
        model=SimpleNamespace(dtype=torch.float32),
        submodule=None,
        d_submodule=D_IN,
        n_ctxs=16,
        ctx_len=128,
        refresh_batch_size=8,
        out_batch_size=256,
        device="cpu",
    )
    trainer = {
        "trainer": MatryoshkaBatchTopKTrainer,
        "steps": 30,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": 8,
        "layer": LAYER,
        "lm_name": "google/gemma-2-2b",
        "group_fractions": [size / D_SAE for size in GROUP_SIZES],
        "warmup_steps": 5,
        "decay_start": 24,
        "threshold_start_step": 5,
        "seed": 0,
        "device": "cpu",
        "wandb_name": "MatryoshkaBatchTopKTrainer-google/gemma-2-2b",
        "submodule_name": f"resid_post_layer_{LAYER}",
    }
    with tempfile.TemporaryDirectory() as saved:
        # Normalized, as the public ones were: the biases and the threshold are scaled when saved.
        trainSAE(buffer, [trainer], 30, save_dir=saved, normalize_activations=True, device="cpu")
        shutil.copytree(Path(saved, "trainer_0"), folder, dirs_exist_ok=True)

    sae = MatryoshkaBatchTopKSAE.from_pretrained(folder / "ae.pt")
    activations = next(buffer)[:N_TOKENS]
    reconstructions = []
    with torch.no_grad():
        for sae.active_groups in range(1, len(GROUP_SIZES) + 1):
            reconstruction, feature_acts = sae(activations, output_features=True)
            reconstructions.append(reconstruction)
    write_computed(folder, dictionary_learning, activations, feature_acts, reconstructions)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    out = parser.parse_args().out
    for name, write in [
        ("saelens_5", write_saelens_5),
        ("dictionary_learning", write_dictionary_learning),
    ]:
        torch.manual_seed(0)
        (out / name).mkdir(parents=True, exist_ok=True)
        write(out / name)


if __name__ == "__main__":
    main()
