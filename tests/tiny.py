"""A random two-layer model, its token data set and short runs on them."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

D_MODEL, N_HEADS, N_CTX, VOCAB = 16, 2, 16, 50
SHORT_RUN: dict[str, Any] = {  # of one SAE or of several
    "model_name": "tiny",
    "dataset_path": "tokens",
    "streaming": False,
    "prepend_bos": False,
    "context_size": N_CTX,
    "n_batches_in_buffer": 4,
    "store_batch_size_prompts": 8,
    "train_batch_size_tokens": 64,
}


def tiny_model(**changes: Any) -> HookedTransformer:
    """With other settings where `changes` has them."""
    settings: dict[str, Any] = {
        "n_layers": 2,
        "d_model": D_MODEL,
        "n_heads": N_HEADS,
        "d_head": D_MODEL // N_HEADS,
        "n_ctx": N_CTX,
        "d_vocab": VOCAB,
        "act_fn": "gelu",
        "seed": 0,
        "default_prepend_bos": False,
    }
    return HookedTransformer(HookedTransformerConfig(**{**settings, **changes}))


def token_dataset(n_rows: int = 600) -> Dataset:
    tokens = torch.randint(0, VOCAB, (n_rows, N_CTX), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"tokens": tokens.tolist()})


def runner_config(
    sae: TrainingSAEConfig, folder: Path, **options: Any
) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        **SHORT_RUN,
        "sae": sae,
        "hook_name": "blocks.1.hook_resid_pre",
        "is_dataset_tokenized": True,
        "training_tokens": 64 * 20,
        "dead_feature_window": 4,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 1,
        "lr": 1e-3,
        "logger": LoggingConfig(log_to_wandb=False),
        "output_path": str(folder / "output"),
        "checkpoint_path": str(folder / "checkpoints"),
        "verbose": False,
        **options,
    }
    return LanguageModelSAERunnerConfig(**settings)


def run(cfg: Any, runner: Any = LanguageModelSAETrainingRunner) -> Any:
    """What a runner trains on the tiny model."""
    torch.manual_seed(0)
    return runner(cfg, override_model=tiny_model(), override_dataset=token_dataset()).run()
