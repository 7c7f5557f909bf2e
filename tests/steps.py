"""SAELens' `matryoshka_batchtopk` and this package's SAE, driven through the same steps."""

import warnings
from typing import Any

import torch
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig


def twins(
    implementation: str, spread: float = 0.2, **options: Any
) -> tuple[MatryoshkaBatchTopKTrainingSAE, MatryoshkaTrainingSAE]:
    """SAELens' SAE and ours, of the same options and the same weights.

    Weights and biases are spread out so that decoder norms, biases and signs all matter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**options))
        ours = MatryoshkaTrainingSAE(
            MatryoshkaTrainingSAEConfig(**options, implementation=implementation)  # type: ignore[arg-type]
        )
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    ours.load_state_dict(peer.state_dict())
    return peer, ours


def run_step(
    sae: TrainingSAE[Any],
    sae_in: torch.Tensor,
    dead: torch.Tensor | None,
    step: int = 0,
    is_logging_step: bool = False,
) -> TrainStepOutput:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=sae_in,
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=is_logging_step,
        )
    )


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_dense() if tensor.is_sparse else tensor).detach()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, and the plain difference where `expected` is zero."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return difference / scale if scale else difference


def outcome(sae: TrainingSAE[Any], output: TrainStepOutput) -> dict[str, torch.Tensor]:
    """Everything a step hands to the trainer, with the gradients of its loss."""
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "sae_out": output.sae_out.detach(),
        "feature_acts": dense(output.feature_acts),
        "topk_threshold": sae.topk_threshold,
        **{f"losses/{name}": value.detach() for name, value in output.losses.items()},
        **{f"grad/{name}": p.grad.clone() for name, p in sae.named_parameters()},
    }
