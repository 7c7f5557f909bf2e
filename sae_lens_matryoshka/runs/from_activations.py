"""The parts of a run on activations that exist already: it has no model, hook or data set."""

from collections.abc import Mapping
from copy import copy
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import str_to_dtype

from sae_lens_matryoshka.activations.batches import ActivationBatches
from sae_lens_matryoshka.activations.index import METADATA_FIELDS


def batches_for(
    cfg: LanguageModelSAERunnerConfig[Any], activations: Any, rank: int = 0, world_size: int = 1
) -> ActivationBatches:
    """The batches of a run, or of one of its processes.

    Args:
        cfg: Its config; `train_batch_size_tokens` is the batch of all processes.
        activations: As `ActivationBatches` takes them.
        rank: This process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: they can't be read, are fewer than a batch, or have another width than the SAE.
    """
    batches = ActivationBatches(
        activations,
        cfg.train_batch_size_tokens // world_size,
        seed=cfg.seed,
        device=cfg.act_store_device or cfg.device,
        dtype=str_to_dtype(cfg.dtype),
        rank=rank,
        world_size=world_size,
    )
    if cfg.sae.d_in != batches.d_in:
        raise ValueError(
            f"sae.d_in={cfg.sae.d_in} is not accepted: the rows of {batches.name} have "
            f"d_in={batches.d_in}."
        )
    return batches


def config_without_model(
    cfg: LanguageModelSAERunnerConfig[Any], metadata: Mapping[str, Any]
) -> LanguageModelSAERunnerConfig[Any]:
    """A copy of a config that names the model and data set of the activations, or none.

    Args:
        cfg: A config whose own names are not those of the activations, such as SAELens' defaults.
        metadata: What is known of the activations.
    """
    cfg = copy(cfg)
    for name in METADATA_FIELDS:
        setattr(cfg, name, metadata.get(name))
    # SAELens' own prefetching would count batches that are not trained on yet
    cfg.prefetch_llm_batches = False
    return cfg


def initial_sae(cfg: LanguageModelSAERunnerConfig[Any]) -> TrainingSAE[Any]:
    """The SAE that training starts with."""
    if cfg.from_pretrained_path is not None:
        return TrainingSAE.load_from_disk(cfg.from_pretrained_path, cfg.device)
    return TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict()).to(cfg.device)
