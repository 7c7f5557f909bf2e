"""Configs that compute the training step of other Matryoshka libraries."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig


def dictionary_learning(
    d_in: int, d_sae: int, k: float, matryoshka_widths: Sequence[int], **options: Any
) -> MatryoshkaTrainingSAEConfig:
    """The step of `MatryoshkaBatchTopKTrainer` of saprmarks/dictionary_learning 0.1.0.

    Weights and threshold move as there: a weight of 1/n² on each of the n levels' errors, decoder
    rows of norm 1, scores without the decoder's norm, and a threshold that is an EMA of
    the cut, with rate 0.001, from step 1,000. Three things lie outside the config:

    - The trainer's: lr is 2e-4 / sqrt(d_sae / 2**14) there, and activations may be scaled to a mean
      square norm of 1. Adam's betas and the clipping of gradients at norm 1 are SAELens' own.
    - b_dec starts at the geometric median of the first batch there, and at 0 here.
    - The auxiliary loss is SAELens'. Theirs takes activations after the ReLU, is divided by the
      variance of the residual, and counts a latent as dead after 10 million activations (SAELens:
      `dead_feature_window` steps). The coefficient is their `auxk_alpha`, 1/32, right where that
      variance is 1.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        k: Mean number of active latents per activation.
        matryoshka_widths: Width of each level, the sums of their group sizes.
        options: Any other field of the config; those set here may be replaced.

    Raises:
        ValueError: from the config, naming the field, its value and what is accepted.
    """
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        matryoshka_widths=matryoshka_widths,  # type: ignore[arg-type]
        **{  # type: ignore[arg-type]
            "decoder_norm": "unit",
            "decoder_init_norm": 1.0,
            "rescale_acts_by_decoder_norm": False,
            "topk_threshold_lr": 0.001,
            "topk_threshold_start_step": 1000,
            "aux_loss_coefficient": 1 / 32,
            **options,
        },
    )
    weights = [1 / cfg.n_levels**2] * cfg.n_levels
    return replace(cfg, **{"level_weights": weights, **options})


def bussmann(
    d_in: int, d_sae: int, k: float, matryoshka_widths: Sequence[int], **options: Any
) -> MatryoshkaTrainingSAEConfig:
    """The step of `GlobalBatchTopKMatryoshkaSAE` of bartbussmann/matryoshka_sae, the paper's code.

    Weights and threshold move as there: the loss is the mean over b_dec alone, the n levels, and
    d_in; there is no encoder bias; decoder rows are given norm 1 just before each update; scores
    exclude the decoder's norm. The encoder starts in the decoder's direction, with the norm that it
    has there on average, sqrt(2 d_in / d_sae). Two things lie outside the config:

    - The trainer's: Adam's betas are 0.9 and 0.99 there, and lr 3e-4. SAELens clips gradients at
      norm 1, and there nothing is clipped in practice: steps are equal while the norm is below 1.
    - The auxiliary loss is SAELens'. Theirs takes 512 dead latents' activations after the ReLU, and
      counts a latent as dead after 20 batches (SAELens: `dead_feature_window`). The coefficient,
      1/(32 d_in), gives the squared error the weight that it has there.

    Arguments and errors are those of `dictionary_learning`.
    """
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        matryoshka_widths=matryoshka_widths,  # type: ignore[arg-type]
        **{  # type: ignore[arg-type]
            "bias_level": True,
            "encoder_bias": False,
            "decoder_norm": "unit_at_update",
            "rescale_acts_by_decoder_norm": False,
            **options,
        },
    )
    at_this_size = {
        "level_weights": [1 / (cfg.n_levels * cfg.d_in)] * cfg.n_levels,
        "aux_loss_coefficient": 1 / (32 * cfg.d_in),
        "decoder_init_norm": math.sqrt(2 * cfg.d_in / cfg.d_sae),
    }
    return replace(cfg, **{**at_this_size, **options})
