"""Levels made of the latents that fire most often.

`order` lists latents by level: order[i] is the latent at position i. `rank` is its inverse: the
position of each latent.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

if TYPE_CHECKING:
    from sae_lens_matryoshka.training.joined_batch import JoinedBatch

# the dimension over latents of each tensor that a training SAE of this package holds
LATENT_DIM = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "firing_rates": 0}

_RATE = 0.01  # of the moving average, the same as for SAELens' threshold


def update_rates(
    rates: Float[torch.Tensor, " d_sae"],
    latents: Int[torch.Tensor, " n"],
    is_firing: Bool[torch.Tensor, " n"],
    batch_size: int,
    joined_batch: "JoinedBatch",
) -> Float[torch.Tensor, " d_sae"]:
    """The moving average of how often each latent fires, after one more batch.

    Args:
        rates: Firings per activation.
        latents: Latents of this process's codes.
        is_firing: Which of the codes count.
        batch_size: Activations of this process.
        joined_batch: The batches of all processes.
    """
    # integers add up to the same in any order, and bincount would wait for the device
    counts = torch.zeros_like(rates, dtype=torch.int64).index_add_(0, latents, is_firing.long())
    counts = joined_batch.sum(counts)
    return rates.lerp(counts.to(rates) / joined_batch.size(batch_size), _RATE)


def level_order(rates: Float[torch.Tensor, " d_sae"]) -> Int[torch.Tensor, " d_sae"]:
    """Latents from the most to the least often firing; ties by index."""
    return rates.argsort(descending=True, stable=True)


def rank_of(order: Int[torch.Tensor, " d_sae"]) -> Int[torch.Tensor, " d_sae"]:
    """The position of each latent in `order`."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank


def reordered(
    tensors: dict[str, Any], order: Int[torch.Tensor, " d_sae"]
) -> dict[str, torch.Tensor]:
    """Those of the named `tensors` that have a dimension over latents, their latents in `order`."""
    return {
        name: tensor.index_select(LATENT_DIM[name], order)
        for name, tensor in tensors.items()
        if name in LATENT_DIM
    }


@torch.no_grad()
def reorder_latents(trainer: SAETrainer[TrainingSAE[Any], Any]) -> None:
    """Put the latents of an SAE in training into level order, with Adam's moments and statistics.

    The SAE stays the same function; only its latents are renumbered. No effect on an SAE whose
    levels are not ordered by frequency.
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
