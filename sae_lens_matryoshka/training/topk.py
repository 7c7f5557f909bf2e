"""The training SAE of the architecture `"matryoshka_topk"`."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from typing_extensions import override

from sae_lens_matryoshka.training.config import MatryoshkaTopKTrainingSAEConfig
from sae_lens_matryoshka.training.dense_encoding import DenselyEncodedTrainingSAE


class MatryoshkaTopKTrainingSAE(DenselyEncodedTrainingSAE, TopKTrainingSAE):
    """Matryoshka TopK SAE: k active latents per token; each level reconstructs alone.

    One training step with a single level equals that of SAELens' TopK training SAE.
    """

    cfg: MatryoshkaTopKTrainingSAEConfig  # type: ignore[assignment]

    @override
    @torch.compiler.disable
    def training_forward_pass(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, step_input: TrainStepInput
    ) -> TrainStepOutput:
        self.activation_fn.k = round(self.cfg.k_at(step_input.n_training_steps))  # type: ignore[assignment]
        return self.nested_step(step_input)

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return TopK(self.cfg.k)

    @override
    def decoder_factors(
        self, feature_acts: Float[torch.Tensor, "batch d_sae"]
    ) -> Float[torch.Tensor, "batch d_sae"]:
        if self.cfg.rescale_acts_by_decoder_norm:
            return feature_acts / self.W_dec.norm(dim=-1)
        return feature_acts
