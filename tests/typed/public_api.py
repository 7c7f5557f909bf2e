"""A user's program, which pyright checks in strict mode and nobody runs: `make lint`."""

from pathlib import Path

import pandas as pd
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.load_model import load_model
from typing_extensions import assert_type

from sae_lens_matryoshka import (
    MatryoshkaTrainingSAEConfig,
    calibrate_threshold,
    decode_levels,
    load_sae,
    truncate,
    widths_of,
)
from sae_lens_matryoshka.levels import levels
from sae_lens_matryoshka.presets import dictionary_learning
from sae_lens_matryoshka.runner import MatryoshkaTrainingRunner, TrainingInterrupted
from sae_lens_matryoshka.steering import compare, latents_of_level, steer
from sae_lens_matryoshka.tree import Tree, build_tree


def train(activations: torch.Tensor | None = None) -> None:
    cfg = LanguageModelSAERunnerConfig(
        sae=MatryoshkaTrainingSAEConfig(
            d_in=768,
            d_sae=24576,
            k=40,
            matryoshka_widths=[768, 2304, 24576],
            level_weights=0.75,
            stop_gradient="inner",
        ),
        model_name="gpt2",
        hook_name="blocks.8.hook_resid_pre",
        dataset_path="apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
        logger=LoggingConfig(log_to_wandb=False),
    )
    try:
        MatryoshkaTrainingRunner(cfg, activations=activations).run()
    except TrainingInterrupted as stopped:
        assert_type(stopped.checkpoint, Path | None)


def configs() -> list[MatryoshkaTrainingSAEConfig]:
    return [
        dictionary_learning(d_in=768, d_sae=24576, k=40, matryoshka_widths=[768, 24576]),
        MatryoshkaTrainingSAEConfig.recommended(d_in=768, d_sae=24576, k=40, n_steps=100_000),
    ]


def look(x: torch.Tensor) -> torch.Tensor:
    sae = load_sae("gemma-2-2b-res-matryoshka-dc", "blocks.12.hook_resid_post", device="cpu")
    assert_type(widths_of(sae), list[int])
    second = levels(sae)[1]
    small = truncate(sae, 96)
    calibrate_threshold(small, x, l0=4)
    small.save_model("level_96")
    assert_type(second.encode(x), torch.Tensor)
    return decode_levels(sae, sae.encode(x))


def specialise() -> Tree:
    sae = load_sae("smollm2-135m-matryoshka", dtype="float32")
    metadata = sae.cfg.metadata
    model = load_model("AutoModelForCausalLM", "HuggingFaceTB/SmolLM2-135M-Instruct")
    print(metadata)
    tree = build_tree(sae, model, "NAME", n_tokens=100_000)
    assert_type(tree.children(23), list[int])
    assert_type(tree.edges, pd.DataFrame)
    tree.save("tree.json")
    with steer(model, sae, dict.fromkeys([23, *tree.children(23)], 2.0), mode="scale"):
        pass
    with steer(model, sae, latents_of_level(sae, 1), mode="ablate"):
        pass
    print(compare(model, sae, "The weather", {23: 4.0}).steered)
    return Tree.load(Path("tree.json"))
