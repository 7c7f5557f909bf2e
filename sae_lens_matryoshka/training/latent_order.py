"""Levels made of the latents that fire most often."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

# The dimension that counts latents, of what a training SAE of this package holds.
LATENT_DIM = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "firing_rates": 0}

_RATE = 0.01  # of the moving average, as that of SAELens' threshold


def update_rates(
    rates: torch.Tensor, latents: torch.Tensor, fired: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """The moving average of how often each latent fires, after one more batch.

    Args:
        rates: (d_sae,) firings per activation.
        latents: (n,) latents of the batch's codes.
        fired: (n,) bool, which of the codes count.
        batch_size: B.
    """
    # integers add up to the same in any order, and bincount would wait for the device
    counts = torch.zeros_like(rates, dtype=torch.int64).index_add_(0, latents, fired.long())
    return rates.lerp(counts.to(rates) / batch_size, _RATE)


def level_order(rates: torch.Tensor) -> torch.Tensor:
    """(d_sae,) latents from the most to the least often firing; ties stay as they are."""
    return rates.argsort(descending=True, stable=True)


def ranks_of(order: torch.Tensor) -> torch.Tensor:
    """(d_sae,) the place of each latent in `order`."""
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks


def in_order(tensors: dict[str, Any], order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of `tensors` that count latents, with their latents in `order`."""
    return {
        name: tensor.index_select(LATENT_DIM[name], order)
        for name, tensor in tensors.items()
        if name in LATENT_DIM
    }


@torch.no_grad()
def reorder_latents(trainer: SAETrainer[TrainingSAE[Any], Any]) -> None:
    """Put the latents of a training into level order: weights, Adam's moments and statistics.

    What is trained stays the same function; only the numbers of the latents change.
    """
    sae = trainer.sae
    rates = getattr(sae, "firing_rates", None)
    if rates is None:
        return
    order = level_order(rates)
    for name, parameter in sae.named_parameters():
        moments = trainer.optimizer.state.get(parameter, {}).values()
        for tensor in (parameter, *(m for m in moments if m.shape == parameter.shape)):
            if name in LATENT_DIM:
                tensor.copy_(tensor.index_select(LATENT_DIM[name], order))
    rates.copy_(rates[order])
    trainer.act_freq_scores = trainer.act_freq_scores[order]
    trainer.n_forward_passes_since_fired = trainer.n_forward_passes_since_fired[order]
