"""The step of architectures whose encoder is SAELens' own and dense.

Their losses on pre-activations are SAELens' as well; the levels are decoded from the codes alone,
as in `batchtopk`.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.training.base import NestedTrainingSAE
from sae_lens_matryoshka.training.objective import DecodeNested, LevelLosses


class DenselyEncodedTrainingSAE(NestedTrainingSAE):
    """A training SAE whose codes are the non-zero entries of dense activations."""

    def decoder_factors(
        self, feature_acts: Float[torch.Tensor, "batch d_sae"]
    ) -> Float[torch.Tensor, "batch d_sae"]:
        """What the decoder rows are multiplied with."""
        return feature_acts

    def has_gradient(
        self,
        feature_acts: Float[torch.Tensor, "batch d_sae"],
        hidden_pre: Float[torch.Tensor, "batch d_sae"],
    ) -> Bool[torch.Tensor, "batch d_sae"]:
        """Where `feature_acts` passes a gradient on."""
        return feature_acts != 0

    def nested_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        """A training step, its k or thresholds being set already."""
        sae_in = step_input.sae_in
        plan = self.plan_step(step_input.n_training_steps)
        n_levels = len(plan.prefixes)
        self._decoder_norm.before_forward(self.W_dec)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        acts = self.decoder_factors(feature_acts)
        backend = self.backend(sae_in)
        if backend is None:
            levels = self.reference_levels(acts, sae_in, plan)
        else:
            rows, latents = self.has_gradient(feature_acts, hidden_pre).nonzero(as_tuple=True)
            kept = acts[rows, latents]
            codes, layout = backend.lay_out(
                Codes(rows, latents, kept, kept, 0.0),
                len(sae_in),
                plan.level_of_latent,
                n_levels,
                plan.rank is None,
            )
            *outputs, _ = DecodeNested.apply(  # type: ignore[misc]
                codes.pre_acts,
                self.W_dec,
                self.b_dec,
                sae_in,
                layout,
                n_levels,
                latents.new_empty(0),
                self.cfg.stop_gradient,
                backend,
            )
            levels = LevelLosses(*outputs)
        named_losses = self.named_losses(levels)
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
            losses={"mse_loss": named_losses.pop("mse_loss"), **aux_losses, **named_losses},
        )
        self.finish_forward(output, step_input, partial(self._count_firings, output))
        if step_input.is_logging_step:
            losses = self.measured_losses(levels, acts.detach(), sae_in, plan)
            scores, latents = _scores_and_latents(output)
            output.metrics |= self.level_metrics(step_input, losses, scores, latents, plan)
        return output

    def _count_firings(self, output: TrainStepOutput) -> None:
        if self.cfg.latent_order == "frequency":  # finding the codes makes the host wait
            self.count_firings(*_scores_and_latents(output), len(output.sae_in))


def _scores_and_latents(output: TrainStepOutput) -> tuple[torch.Tensor, torch.Tensor]:
    acts = output.feature_acts.detach()
    rows, latents = acts.nonzero(as_tuple=True)
    return acts[rows, latents], latents
