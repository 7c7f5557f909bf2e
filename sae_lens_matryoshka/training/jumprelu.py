"""The training SAE of the architecture `"matryoshka_jumprelu"`."""

import torch
from jaxtyping import Bool, Float
from sae_lens import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_matryoshka.training.config import MatryoshkaJumpReLUTrainingSAEConfig
from sae_lens_matryoshka.training.dense_encoding import DenselyEncodedTrainingSAE


class MatryoshkaJumpReLUTrainingSAE(DenselyEncodedTrainingSAE, JumpReLUTrainingSAE):
    """Matryoshka JumpReLU SAE, as in Gemma Scope 2; its sparsity loss is SAELens'.

    One training step with a single level equals that of SAELens' JumpReLU training SAE.
    """

    cfg: MatryoshkaJumpReLUTrainingSAEConfig  # type: ignore[assignment]

    @override
    @torch.compiler.disable
    def training_forward_pass(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, step_input: TrainStepInput
    ) -> TrainStepOutput:
        with torch.no_grad():
            self.threshold.clamp_(min=0.0)  # as SAELens does
        return self.nested_step(step_input)

    @override
    def has_gradient(
        self,
        feature_acts: Float[torch.Tensor, "batch d_sae"],
        hidden_pre: Float[torch.Tensor, "batch d_sae"],
    ) -> Bool[torch.Tensor, "batch d_sae"]:
        # a threshold also learns from pre-activations just below it
        distances = (hidden_pre - self.threshold.to(hidden_pre.dtype)) / self.bandwidth
        return (distances.abs() < 0.5) | (feature_acts != 0)
