"""SAELens' `matryoshka_batchtopk` and this package's SAE, driven through the same steps."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig


def spread(sae: TrainingSAE[Any], by: float = 0.2) -> None:
    """Spread weights and biases out so that decoder norms, biases and signs all matter."""
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * by)


def twins(
    implementation: str, **options: Any
) -> tuple[MatryoshkaBatchTopKTrainingSAE, MatryoshkaTrainingSAE]:
    """SAELens' SAE and ours, of the same options and the same weights, which are spread out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**options))
        ours = MatryoshkaTrainingSAE(
            MatryoshkaTrainingSAEConfig(**options, implementation=implementation)  # type: ignore[arg-type]
        )
    spread(peer)
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


def assert_near(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Both hold the same names, and each tensor's relative error is below the tolerance."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) < tolerance, name


def outcome(sae: TrainingSAE[Any], output: TrainStepOutput) -> dict[str, torch.Tensor]:
    """Everything a step hands to the trainer, with the gradients of its loss alone."""
    sae.zero_grad()
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "sae_out": output.sae_out.detach(),
        "feature_acts": dense(output.feature_acts),
        "topk_threshold": sae.topk_threshold,
        **{f"losses/{name}": value.detach() for name, value in output.losses.items()},
        **{f"grad/{name}": p.grad.clone() for name, p in sae.named_parameters()},
    }
