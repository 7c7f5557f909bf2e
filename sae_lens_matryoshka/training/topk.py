"""The nested objective on SAELens' TopK and JumpReLU training SAEs.

Their encoders are SAELens' own and dense, and so are its losses on pre-activations; the levels are
decoded from the codes alone, as in `training_sae`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens import JumpReLUTrainingSAE, TopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from typing_extensions import override

from sae_lens_matryoshka.kernels.selection import Codes
from sae_lens_matryoshka.training.base import NestedTrainingSAE
from sae_lens_matryoshka.training.config import (
    MatryoshkaJumpReLUTrainingSAEConfig,
    MatryoshkaTopKTrainingSAEConfig,
)


class _DenselyEncoded(NestedTrainingSAE):
    """A step whose codes are picked from dense activations."""

    def decoder_factors(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(B, d_sae) what the decoder rows are multiplied with."""
        return feature_acts

    def has_gradient(self, feature_acts: torch.Tensor, hidden_pre: torch.Tensor) -> torch.Tensor:
        """(B, d_sae) where the loss' gradient to `feature_acts` goes any further."""
        return feature_acts != 0

    def nested_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        sae_in = step_input.sae_in
        plan = self.plan(step_input.n_training_steps)
        self.hold_decoder_norm()
        feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        acts = self.decoder_factors(feature_acts)
        kernels = self.kernels(sae_in)
        if kernels is not None:
            mask = self.has_gradient(feature_acts, hidden_pre)
            rows, latents = mask.nonzero(as_tuple=True)
            picked = acts[rows, latents]
            codes = Codes(rows, latents, picked, picked, 0.0)
            codes, layout = self.in_level_order(codes, len(sae_in), plan, kernels)
            levels, _ = self.sparse_levels(
                codes.pre_acts, sae_in, plan, layout, latents.new_empty(0), kernels
            )
        else:
            levels = self.dense_levels(acts, sae_in, plan)
        named = self.named_losses(levels, plan)
        aux_losses: Any = self.calculate_aux_loss(
            step_input=step_input,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            sae_out=levels.sae_out,
        )
        output = TrainStepOutput(
            sae_in=sae_in,
            sae_out=levels.sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=self.total_loss(levels, plan) + sum(aux_losses.values()),
            losses={"mse_loss": named.pop("mse_loss"), **aux_losses, **named},
        )
        self.require_finite(output, step_input)
        rows, active_latents = feature_acts.detach().nonzero(as_tuple=True)
        active = feature_acts.detach()[rows, active_latents]
        self.count_firings(active, active_latents, len(sae_in))
        if step_input.is_logging_step:
            losses = levels.losses.detach()[self.cfg.bias_level :]
            if self.cfg.is_sampled:
                losses = self.measured_losses(acts.detach(), sae_in, plan)
            metrics = self.level_metrics(step_input, losses, active, active_latents, plan)
            output.metrics.update(metrics)
        return output


class MatryoshkaTopKTrainingSAE(_DenselyEncoded, TopKTrainingSAE):
    """Matryoshka TopK SAE: k latents of each token, every prefix of them reconstructing alone.

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
    def decoder_factors(self, feature_acts: torch.Tensor) -> torch.Tensor:
        if self.cfg.rescale_acts_by_decoder_norm:
            return feature_acts / self.W_dec.norm(dim=-1)
        return feature_acts


class MatryoshkaJumpReLUTrainingSAE(_DenselyEncoded, JumpReLUTrainingSAE):
    """Matryoshka JumpReLU SAE, the sort of Gemma Scope 2; its sparsity loss is SAELens'.

    One training step with a single level equals that of SAELens' JumpReLU training SAE.
    """

    cfg: MatryoshkaJumpReLUTrainingSAEConfig  # type: ignore[assignment]

    @override
    @torch.compiler.disable
    def training_forward_pass(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, step_input: TrainStepInput
    ) -> TrainStepOutput:
        with torch.no_grad():
            self.threshold.clamp_(min=0.0)  # as SAELens keeps it
        return self.nested_step(step_input)

    @override
    def has_gradient(self, feature_acts: torch.Tensor, hidden_pre: torch.Tensor) -> torch.Tensor:
        # a threshold also learns from the latents just below it
        distances = (hidden_pre - self.threshold.to(hidden_pre.dtype)) / self.bandwidth
        return (distances.abs() < 0.5) | (feature_acts != 0)
