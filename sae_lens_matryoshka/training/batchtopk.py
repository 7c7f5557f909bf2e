"""The training SAE of the architecture `"matryoshka"`."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import torch
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_matryoshka.kernels.dispatch import Kernels
from sae_lens_matryoshka.kernels.out_of_memory import name_tensor_on_oom
from sae_lens_matryoshka.kernels.selection import FLOOR_FRACTION, Codes
from sae_lens_matryoshka.kernels.transfers import TrueIndices
from sae_lens_matryoshka.training.base import NestedTrainingSAE, Plan
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.monitoring import TrainingMonitor
from sae_lens_matryoshka.training.objective import Levels, auxiliary_loss, encode_selected
from sae_lens_matryoshka.training.thresholds import ActivationSample, batch_threshold, encoder_input


class _Step(NamedTuple):
    """One batch through the SAE, whichever implementation computed it."""

    levels: Levels
    feature_acts: torch.Tensor
    hidden_pre: torch.Tensor
    active: torch.Tensor  # (n,) scores, 0 where a code only fills up
    active_latents: torch.Tensor  # (n,)
    dead: torch.Tensor  # (D,) by level
    dead_pre_acts: torch.Tensor  # (B, D)
    dead_decoder_rows: torch.Tensor  # (D, d_in)


class MatryoshkaTrainingSAE(NestedTrainingSAE, BatchTopKTrainingSAE):
    """Matryoshka BatchTopK SAE (Bussmann et al., arXiv 2503.17547) for SAELens' trainers.

    One training step equals that of SAELens' `matryoshka_batchtopk`: the losses, their gradients,
    the reconstruction, the codes and the threshold. Saved for inference it is a JumpReLU SAE that
    plain SAELens loads, with the level widths in its metadata.

    The "sparse" implementation returns `feature_acts` as a sparse COO tensor, without gradient, and
    as `hidden_pre` the same tensor: the pre-activations of the codes that were kept, all that it
    computes of them. SAELens' trainer reads both that way.

    `topk_threshold` moves as SAELens' does. What is saved for inference is calibrated anew, with
    the trained weights, on a sample of the run's activations: SAELens' moving average starts at 0
    and lags behind the weights. The sample is in no checkpoint; a resumed run gathers it anew.
    """

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        # Speeds up the selection and never changes it, so a checkpoint does without.
        self._score_floor: float | torch.Tensor | None = None
        self._sample = ActivationSample()
        self._monitor = TrainingMonitor(cfg)

    @override
    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        if self._sample.rows is None:
            if self.topk_threshold > 0:
                warnings.warn(
                    "This SAE has seen no activation since it was loaded, so what is saved has "
                    "SAELens' moving average as its threshold; sae_lens_matryoshka."
                    "calibrate_threshold sets it from activations.",
                    stacklevel=3,
                )
        else:
            x = encoder_input(self, self._sample.rows)
            cut = batch_threshold(x, state_dict["W_enc"], state_dict["b_enc"], self.cfg.k)
            state_dict["threshold"] = torch.full_like(state_dict["threshold"], cut)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self._sample.rows is not None:
            self._sample.replace(self._sample.rows / scaling_factor)

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: torch.Tensor,
        whitening_matrix: torch.Tensor,
        unwhitening_matrix: torch.Tensor,
    ) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        if self._sample.rows is not None:
            rows = self._sample.rows.to(unwhitening_matrix)
            self._sample.replace(rows @ unwhitening_matrix + mean)

    @override
    @torch.compiler.disable  # sorts and sizes that depend on data: compiling could only break it up
    def training_forward_pass(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, step_input: TrainStepInput
    ) -> TrainStepOutput:
        sae_in, n_steps = step_input.sae_in, step_input.n_training_steps
        self.hold_decoder_norm()
        self.activation_fn.k = self.cfg.k_at(n_steps)  # type: ignore[assignment]
        plan = self.plan(n_steps)
        dead = None
        if step_input.dead_neuron_mask is not None and self.cfg.aux_loss_coefficient != 0:
            dead = TrueIndices(step_input.dead_neuron_mask)
        kernels = self._kernels(step_input)
        if kernels is None:
            step = self._reference_step(sae_in, dead, plan)
        else:
            step = self._sparse_step(sae_in, dead, plan, kernels)

        aux_loss = self._auxiliary_loss(step, plan)
        mse_losses = self.named_losses(step.levels, plan)
        output = TrainStepOutput(
            sae_in=sae_in,
            sae_out=step.levels.sae_out,
            feature_acts=step.feature_acts,
            hidden_pre=step.hidden_pre,
            loss=self.total_loss(step.levels, plan) + aux_loss,
            losses={
                "mse_loss": mse_losses.pop("mse_loss"),
                "auxiliary_reconstruction_loss": aux_loss,
                **mse_losses,
            },
        )
        self.require_finite(output, step_input)

        self._follow_threshold(step.active, n_steps)
        self.count_firings(step.active, step.active_latents, len(sae_in))
        self._sample.add(sae_in.detach())
        self._observe(step, sae_in, plan, n_steps)
        output.metrics = {"topk_threshold": self.topk_threshold}
        if step_input.is_logging_step:
            output.metrics.update(self._measured_levels(step_input, step, plan))
        return output

    def _follow_threshold(self, active: torch.Tensor, n_steps: int) -> None:
        start = self.cfg.topk_threshold_start_step
        if start is None or n_steps > start:
            self.update_topk_threshold(active)

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        # As SAELens', without waiting for the device to say whether any score is positive.
        if acts_topk.numel() == 0:
            return
        before, rate = self.topk_threshold, self.cfg.topk_threshold_lr
        is_positive = acts_topk > 0
        smallest = acts_topk.masked_fill(~is_positive, torch.inf).min().to(before.dtype)
        after = (1 - rate) * before + rate * smallest
        if self.cfg.topk_threshold_start_step is not None:
            after = torch.where(before == 0, smallest, after)  # the first cut it sees
        self.topk_threshold = torch.where(is_positive.any(), after, before)

    def _observe(self, step: _Step, sae_in: torch.Tensor, plan: Plan, n_steps: int) -> None:
        if self.cfg.is_sampled:  # no step computes the losses of the levels to be judged
            return
        latents = step.active_latents
        places = latents if plan.ranks is None else plan.ranks[latents]
        losses = step.levels.losses[self.cfg.bias_level :]
        self._monitor.observe(losses, step.active, places, sae_in, n_steps)

    def _kernels(self, step_input: TrainStepInput) -> Kernels | None:
        """Who computes the step from its codes; None where the reference does."""
        hooks = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post)
        if self.is_hooked(*hooks) or step_input.sae_in.requires_grad:
            return None
        return self.kernels(step_input.sae_in)

    def _reference_step(self, sae_in: torch.Tensor, dead: TrueIndices | None, plan: Plan) -> _Step:
        feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        norms = self._score_norms()
        acts, pre_acts = feature_acts, hidden_pre
        if norms is not None:
            acts, pre_acts = feature_acts / norms, hidden_pre / norms
        rows, latents = feature_acts.detach().nonzero(as_tuple=True)
        dead_latents = _by_level(dead, plan)
        return _Step(
            levels=self.dense_levels(acts, sae_in, plan),
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            active=feature_acts.detach()[rows, latents],
            active_latents=latents,
            dead=dead_latents,
            dead_pre_acts=pre_acts[:, dead_latents],
            dead_decoder_rows=self.W_dec[dead_latents],
        )

    def _sparse_step(
        self, sae_in: torch.Tensor, dead: TrueIndices | None, plan: Plan, kernels: Kernels
    ) -> _Step:
        with torch.no_grad():
            x = self.process_sae_in(sae_in)
            codes = self._select(x, kernels)
            codes, layout = self.in_level_order(codes, len(sae_in), plan, kernels)
        dead_latents = _by_level(dead, plan)  # the host waits here, if at all
        b_in = self.b_dec if self.cfg.apply_b_dec_to_input else None
        acts, dead_rows, dead_biases = encode_selected(
            x, self.W_enc, self.b_enc, b_in, codes, layout, dead_latents, kernels
        )
        levels, dead_decoder_rows = self.sparse_levels(
            acts, sae_in, plan, layout, dead_latents, kernels
        )
        feature_acts = torch.sparse_coo_tensor(
            torch.stack([codes.rows, codes.latents]),
            codes.scores,
            (len(sae_in), self.cfg.d_sae),
            is_coalesced=plan.ranks is None and codes.n_used is None,
            check_invariants=False,
        )
        return _Step(
            levels=levels,
            feature_acts=feature_acts,
            hidden_pre=feature_acts,
            active=codes.scores,
            active_latents=codes.latents,
            dead=dead_latents,
            dead_pre_acts=x @ dead_rows.T + dead_biases,
            dead_decoder_rows=dead_decoder_rows,
        )

    def _select(self, x: torch.Tensor, kernels: Kernels) -> Codes:
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with name_tensor_on_oom("the pre-activations", (len(x), self.cfg.d_sae), dtype):
            codes = kernels.select(
                x,
                self.W_enc,
                self.b_enc,
                self._score_norms(),
                n_keep=int(self.activation_fn.k * len(x)),  # type: ignore[attr-defined]
                floor=self._score_floor,
            )
        self._score_floor = codes.cut * FLOOR_FRACTION
        return codes

    def _score_norms(self) -> torch.Tensor | None:
        """Decoder norms (d_sae,), or None where the config ranks by pre-activation alone."""
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    def _auxiliary_loss(self, step: _Step, plan: Plan) -> torch.Tensor:
        dead = step.dead
        if len(dead) == 0:
            return step.levels.losses.new_zeros(())
        if self.cfg.use_matryoshka_aux_loss:
            places = dead if plan.ranks is None else plan.ranks[dead]
            ends = torch.tensor(plan.prefixes, device=dead.device)
            groups = list(itertools.pairwise([0, *torch.searchsorted(places, ends).tolist()]))
        else:
            groups = [*[(0, 0)] * (len(plan.prefixes) - 1), (0, len(dead))]
        norms = None
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = step.dead_decoder_rows.detach().norm(dim=-1)
        loss = step.levels.losses.new_zeros(())
        for residual, (start, end) in zip(step.levels.residuals, groups, strict=True):
            if start < end:
                loss = loss + auxiliary_loss(
                    residual,
                    step.dead_pre_acts[:, start:end],
                    None if norms is None else norms[start:end],
                    step.dead_decoder_rows[start:end],
                )
        return self.cfg.aux_loss_coefficient * loss

    def _measured_levels(self, step_input: TrainStepInput, step: _Step, plan: Plan) -> Any:
        losses = step.levels.losses.detach()[self.cfg.bias_level :]
        if self.cfg.is_sampled:
            acts, norms = step.feature_acts.detach().to_dense(), self._score_norms()
            acts = acts if norms is None else acts / norms
            losses = self.measured_losses(acts, step_input.sae_in, plan)
        return self.level_metrics(step_input, losses, step.active, step.active_latents, plan)


def _by_level(dead: TrueIndices | None, plan: Plan) -> torch.Tensor:
    """(D,) the dead latents in level order, as the prefixes cut them."""
    if dead is None:
        return torch.empty(0, dtype=torch.long, device=plan.levels.device)
    latents = dead.get()
    return latents if plan.ranks is None else latents[plan.ranks[latents].argsort()]
