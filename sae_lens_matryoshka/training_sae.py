"""The training SAE of the architecture `"matryoshka"`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_matryoshka.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.monitoring import TrainingMonitor
from sae_lens_matryoshka.objective import (
    Layout,
    Levels,
    auxiliary_loss,
    decode_nested,
    encode_selected,
    reference_levels,
    reference_reconstructions,
)
from sae_lens_matryoshka.selection import FLOOR_FRACTION, Codes, select
from sae_lens_matryoshka.thresholds import ActivationSample, batch_threshold, encoder_input

_SPARSE_DEVICES = ("cpu", "cuda")


class _Step(NamedTuple):
    """One batch through the SAE, whichever implementation computed it."""

    levels: Levels
    feature_acts: torch.Tensor
    hidden_pre: torch.Tensor
    active: torch.Tensor  # (n,) scores above 0
    active_latents: torch.Tensor  # (n,)
    dead_pre_acts: torch.Tensor  # (B, D)
    dead_decoder_rows: torch.Tensor  # (D, d_in)


class MatryoshkaTrainingSAE(BatchTopKTrainingSAE):
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
        self._score_floor: float | None = None
        self._sample = ActivationSample()
        self._monitor = TrainingMonitor(cfg)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = _rows_contiguous(self.W_enc.data)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _rows_contiguous(state_dict["W_enc"])

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
        dead = torch.empty(0, dtype=torch.long, device=step_input.sae_in.device)
        if step_input.dead_neuron_mask is not None and self.cfg.aux_loss_coefficient != 0:
            dead = step_input.dead_neuron_mask.nonzero().flatten()
        run = self._reference_step if self._needs_dense(step_input) else self._sparse_step
        step = run(step_input.sae_in, dead)

        *inner_losses, mse_loss = step.levels.losses
        aux_loss = self._auxiliary_loss(step, dead)
        losses = {
            "mse_loss": mse_loss,
            "auxiliary_reconstruction_loss": aux_loss,
            **{
                f"inner_mse_loss_{width}": loss
                for width, loss in zip(self.cfg.matryoshka_widths, inner_losses, strict=False)
            },
        }
        loss = step.levels.losses.sum() + aux_loss
        if not loss.isfinite():
            raise ValueError(self._not_finite(step_input, {**losses, "the sum of losses": loss}))

        self.update_topk_threshold(step.active)
        self._sample.add(step_input.sae_in.detach())
        self._monitor.observe(
            step.levels.losses, step.active, step.active_latents, step_input.sae_in
        )
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=step.levels.sae_out,
            feature_acts=step.feature_acts,
            hidden_pre=step.hidden_pre,
            loss=loss,
            losses=losses,
            metrics={"topk_threshold": self.topk_threshold},
        )
        if step_input.is_logging_step:
            output.metrics.update(self._level_metrics(step_input, step))
        return output

    def _needs_dense(self, step_input: TrainStepInput) -> bool:
        """Whether the step is to be computed by the reference."""
        sae_in = step_input.sae_in
        if self.cfg.implementation == "auto" and sae_in.device.type not in _SPARSE_DEVICES:
            return True
        # A hook is there to see, or to change, the dense tensors of a step.
        points = (
            self.hook_sae_input,
            self.hook_sae_acts_pre,
            self.hook_sae_acts_post,
            self.hook_sae_recons,
        )
        hooked = any(
            point._forward_hooks or point._forward_pre_hooks or point._backward_hooks
            for point in points
        )
        return (
            hooked
            or self.cfg.implementation == "reference"
            or self.cfg.normalizes_per_row
            or sae_in.requires_grad
        )

    def _reference_step(self, sae_in: torch.Tensor, dead: torch.Tensor) -> _Step:
        feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        norms = self._score_norms()
        acts, pre_acts = feature_acts, hidden_pre
        if norms is not None:
            acts, pre_acts = feature_acts / norms, hidden_pre / norms
        *inner, outermost = reference_reconstructions(
            acts, self.W_dec, self.b_dec, self.cfg.matryoshka_widths
        )
        reconstructions = torch.stack([*inner, self.hook_sae_recons(outermost)])
        rows, latents = feature_acts.detach().nonzero(as_tuple=True)
        return _Step(
            levels=reference_levels(self.run_time_activation_norm_fn_out(reconstructions), sae_in),
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            active=feature_acts.detach()[rows, latents],
            active_latents=latents,
            dead_pre_acts=pre_acts[:, dead],
            dead_decoder_rows=self.W_dec[dead],
        )

    def _sparse_step(self, sae_in: torch.Tensor, dead: torch.Tensor) -> _Step:
        with torch.no_grad():
            x = self.process_sae_in(sae_in)
            codes = self._select(x)
        widths = self.cfg.matryoshka_widths
        b_in = self.b_dec if self.cfg.apply_b_dec_to_input else None
        layout = Layout.of(codes, len(sae_in), widths)
        acts, dead_rows, dead_biases = encode_selected(
            x, self.W_enc, self.b_enc, b_in, codes, layout, dead
        )
        levels, dead_decoder_rows = decode_nested(
            acts, self.W_dec, self.b_dec, sae_in, layout, len(widths), dead
        )
        feature_acts = torch.sparse_coo_tensor(
            torch.stack([codes.rows, codes.latents]),
            codes.scores,
            (len(sae_in), self.cfg.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )
        return _Step(
            levels=levels,
            feature_acts=feature_acts,
            hidden_pre=feature_acts,
            active=codes.scores,
            active_latents=codes.latents,
            dead_pre_acts=x @ dead_rows.T + dead_biases,
            dead_decoder_rows=dead_decoder_rows,
        )

    def _select(self, x: torch.Tensor) -> Codes:
        codes = select(
            x,
            self.W_enc,
            self.b_enc,
            self._score_norms(),
            n_keep=int(self.cfg.k * len(x)),
            floor=self._score_floor,
        )
        self._score_floor = codes.cut * FLOOR_FRACTION
        return codes

    def _score_norms(self) -> torch.Tensor | None:
        """Decoder norms (d_sae,), or None where the config ranks by pre-activation alone."""
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    def _auxiliary_loss(self, step: _Step, dead: torch.Tensor) -> torch.Tensor:
        widths = self.cfg.matryoshka_widths
        if self.cfg.use_matryoshka_aux_loss:
            ends = [0, *torch.searchsorted(dead, torch.tensor(widths, device=dead.device)).tolist()]
            groups = list(itertools.pairwise(ends))
        else:
            groups = [*[(0, 0)] * (len(widths) - 1), (0, len(dead))]
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

    def _level_metrics(
        self, step_input: TrainStepInput, step: _Step
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """Variance explained, mean L0 and dead latents of each level, computed when called."""
        # SAELens promotes likewise: sums of squares in 16 bits are too coarse
        sae_in = step_input.sae_in.to(torch.promote_types(step_input.sae_in.dtype, torch.float32))

        @cache
        def variance() -> torch.Tensor:
            return (sae_in - sae_in.mean(0)).pow(2).sum(-1).mean()

        def explained_variance(level_loss: torch.Tensor) -> torch.Tensor:
            return 1 - level_loss / variance()

        def l0(width: int) -> torch.Tensor:
            return (step.active_latents < width).sum() / len(sae_in)

        metrics: dict[str, Callable[[], torch.Tensor]] = {}
        for width, loss in zip(
            self.cfg.matryoshka_widths, step.levels.losses.detach(), strict=True
        ):
            metrics[f"explained_variance_level_{width}"] = partial(explained_variance, loss)
            metrics[f"l0_level_{width}"] = partial(l0, width)
            if step_input.dead_neuron_mask is not None:
                metrics[f"dead_latents_level_{width}"] = step_input.dead_neuron_mask[:width].sum
        return metrics

    def _not_finite(self, step_input: TrainStepInput, losses: dict[str, torch.Tensor]) -> str:
        """Which tensor made the loss non-finite, the inputs of the step first."""
        tensors = {
            "sae_in (the activations)": step_input.sae_in,
            **{f"the parameter {name}": value for name, value in self.named_parameters()},
            **losses,
        }
        name, value = next(
            (name, value) for name, value in tensors.items() if not value.isfinite().all()
        )
        n_nan, n_inf = int(value.isnan().sum()), int(value.isinf().sum())
        return (
            f"Training stopped at step {step_input.n_training_steps}: {name}, of shape "
            f"{tuple(value.shape)}, holds {n_nan} NaN and {n_inf} infinite values. No weight was "
            "changed by this batch, and checkpoints saved before it are intact."
        )


def _rows_contiguous(W_enc: torch.Tensor) -> torch.Tensor:
    """W_enc (d_in, d_sae) with each latent's encoder row contiguous, as its gradient is written."""
    return W_enc.T.contiguous().T
