"""The training SAE of the architecture `"matryoshka"`."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.dispatch import Backend
from sae_lens_matryoshka.kernels.joined_selection import JoinedBatchTopK, select_joined
from sae_lens_matryoshka.kernels.out_of_memory import name_tensor_on_oom
from sae_lens_matryoshka.kernels.transfers import TrueIndices
from sae_lens_matryoshka.training.base import NestedTrainingSAE, StepPlan
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.feature_acts import FeatureActs
from sae_lens_matryoshka.training.monitoring import TrainingMonitor
from sae_lens_matryoshka.training.objective import (
    DecodeNested,
    EncodeKept,
    LevelLosses,
    auxiliary_loss,
    sparse_auxiliary_loss,
)
from sae_lens_matryoshka.training.thresholds import (
    ActivationSample,
    batch_threshold,
    encoder_input,
)


class _Forward(NamedTuple):
    """One batch through encoder and decoder, computed sparsely or by the reference."""

    levels: LevelLosses
    feature_acts: torch.Tensor  # (B, d_sae), sparse or dense
    hidden_pre: torch.Tensor  # (B, d_sae)
    scores: torch.Tensor  # (n,) of the codes, 0 for padding
    latents: torch.Tensor  # (n,) of the codes
    dead: torch.Tensor  # (D,) dead latents in level order
    dead_decoder_rows: torch.Tensor  # (D, d_in)
    # of a residual, the part of the dead latents, and the norms of their decoder rows
    dead_loss: Callable[[torch.Tensor, slice | EllipsisType, torch.Tensor | None], torch.Tensor]


class MatryoshkaTrainingSAE(NestedTrainingSAE, BatchTopKTrainingSAE):
    """Matryoshka BatchTopK SAE (Bussmann et al., arXiv 2503.17547) for SAELens' trainers.

    One training step equals that of SAELens' `matryoshka_batchtopk`: the losses, their gradients,
    the reconstruction, the codes and the threshold. Saved for inference it is a JumpReLU SAE that
    plain SAELens loads, with the level widths in its metadata.

    The sparse backends return `feature_acts` as a sparse COO tensor without gradient, and the same
    tensor as `hidden_pre`: they compute no other pre-activations. SAELens' trainer accepts both.

    `topk_threshold` is SAELens' moving average, which starts at 0 and lags behind the weights. The
    threshold of the saved SAE is calibrated instead, with the trained weights, on a sample of the
    run's activations. Checkpoints don't hold the sample; a resumed run gathers a new one.
    """

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        # speeds up the selection and never changes it, so checkpoints don't need it
        self._last_cut: float | torch.Tensor | None = None
        self._sample = ActivationSample()
        self._monitor = TrainingMonitor(cfg)

    @override
    @torch.compiler.disable  # sorting and data-dependent sizes would break the graph at every line
    def training_forward_pass(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, step_input: TrainStepInput
    ) -> TrainStepOutput:
        sae_in, step = step_input.sae_in, step_input.n_training_steps
        plan = self.plan_step(step)
        self.activation_fn.k = self.cfg.k_at(step)  # type: ignore[assignment]
        self._decoder_norm.before_forward(self.W_dec)
        dead = None
        if step_input.dead_neuron_mask is not None and self.cfg.aux_loss_coefficient != 0:
            dead = TrueIndices(step_input.dead_neuron_mask)

        hook_points = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post)
        backend = self.backend(sae_in, *hook_points)
        if backend is None:
            forward = self._reference_forward(sae_in, dead, plan)
        else:
            forward = self._sparse_forward(sae_in, dead, plan, backend)

        aux_loss = self._auxiliary_loss(forward, plan)
        named_losses = self.named_losses(forward.levels)
        output = TrainStepOutput(
            sae_in=sae_in,
            sae_out=forward.levels.sae_out,
            feature_acts=forward.feature_acts,
            hidden_pre=forward.hidden_pre,
            loss=self.total_loss(forward.levels, plan) + aux_loss,
            losses={
                "mse_loss": named_losses.pop("mse_loss"),
                "auxiliary_reconstruction_loss": aux_loss,
                **named_losses,
            },
        )
        # not all of `forward`, whose residuals the backward pass frees
        losses, scores, latents = forward.levels.losses.detach(), forward.scores, forward.latents
        self.finish_forward(
            output,
            step_input,
            partial(self._update_statistics, output, losses, scores, latents, plan, step),
        )
        if step_input.is_logging_step:
            acts = forward.feature_acts.detach()
            if self.cfg.is_sampled and (norms := self._score_norms()) is not None:
                acts = acts.to_dense() / norms
            measured = self.measured_losses(forward.levels, acts, sae_in, plan)
            output.metrics |= self.level_metrics(step_input, measured, scores, latents, plan)
        return output

    def _sparse_forward(
        self, sae_in: torch.Tensor, dead: TrueIndices | None, plan: StepPlan, backend: Backend
    ) -> _Forward:
        n_levels = len(plan.prefixes)
        with torch.no_grad():
            x = self.process_sae_in(sae_in)
            codes = self._select(x, backend)
            codes, layout = backend.lay_out(
                codes, len(sae_in), plan.level_of_latent, n_levels, plan.rank is None
            )
        dead_latents = _in_level_order(dead, plan)  # the host waits here, if at all
        b_in = self.b_dec if self.cfg.apply_b_dec_to_input else None
        acts, dead_rows, dead_biases = EncodeKept.apply(  # type: ignore[misc]
            x, self.W_enc, self.b_enc, b_in, codes, layout, dead_latents, backend
        )
        *levels, dead_decoder_rows = DecodeNested.apply(  # type: ignore[misc]
            acts,
            self.W_dec,
            self.b_dec,
            sae_in,
            layout,
            n_levels,
            dead_latents,
            self.cfg.stop_gradient,
            backend,
        )
        is_sorted = plan.rank is None and codes.n_valid is None
        feature_acts = FeatureActs.of(codes, layout, len(sae_in), is_sorted)
        return _Forward(
            levels=LevelLosses(*levels),
            feature_acts=feature_acts,
            hidden_pre=feature_acts,
            scores=codes.scores,
            latents=codes.latents,
            dead=dead_latents,
            dead_decoder_rows=dead_decoder_rows,
            dead_loss=lambda residual, part, norms: sparse_auxiliary_loss(
                residual,
                x,
                dead_rows[part],
                dead_biases[part],
                norms,
                dead_decoder_rows[part],
                backend,
            ),
        )

    def _select(self, x: Float[torch.Tensor, "batch d_in"], backend: Backend) -> Codes:
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

        def select(n_keep: int) -> Codes:
            return backend.select(
                x,
                self.W_enc,
                self.b_enc,
                self._score_norms(),
                n_keep,
                self._last_cut,
                self.cfg.selection,
            )

        batch_size = self.joined_batch.size(len(x))
        n_keep = int(self.activation_fn.k * batch_size)  # type: ignore[attr-defined]
        with name_tensor_on_oom("the pre-activations", (len(x), self.cfg.d_sae), dtype):
            if self.joined_batch.group is None:
                codes = select(n_keep)
            else:
                n_scores = len(x) * self.cfg.d_sae
                codes = select_joined(select, n_keep, n_scores, self.joined_batch.group)
        self._last_cut = codes.cut
        return codes

    def _reference_forward(
        self, sae_in: torch.Tensor, dead: TrueIndices | None, plan: StepPlan
    ) -> _Forward:
        with self._selecting_jointly():
            feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        norms = self._score_norms()
        acts, pre_acts = feature_acts, hidden_pre
        if norms is not None:
            acts, pre_acts = feature_acts / norms, hidden_pre / norms
        rows, latents = feature_acts.detach().nonzero(as_tuple=True)
        dead_latents = _in_level_order(dead, plan)
        dead_pre_acts, dead_rows = pre_acts[:, dead_latents], self.W_dec[dead_latents]
        return _Forward(
            levels=self.reference_levels(acts, sae_in, plan),
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            scores=feature_acts.detach()[rows, latents],
            latents=latents,
            dead=dead_latents,
            dead_decoder_rows=dead_rows,
            dead_loss=lambda residual, part, norms: auxiliary_loss(
                residual, dead_pre_acts[:, part], norms, dead_rows[part]
            ),
        )

    @contextmanager
    def _selecting_jointly(self) -> Iterator[None]:
        """Within a step, SAELens' encoder keeps the largest scores of the joined batch."""
        plain, group = self.activation_fn, self.joined_batch.group
        if group is not None:
            self.activation_fn = JoinedBatchTopK(plain.k, group)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.activation_fn = plain

    def _score_norms(self) -> Float[torch.Tensor, " d_sae"] | None:
        """Decoder norms, or None where the config ranks by pre-activation alone."""
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    def _auxiliary_loss(self, forward: _Forward, plan: StepPlan) -> torch.Tensor:
        dead, loss = forward.dead, forward.levels.losses.new_zeros(())
        if len(dead) == 0:
            return loss
        if self.cfg.use_matryoshka_aux_loss:
            prefixes = torch.tensor(plan.prefixes, device=dead.device)
            ends = torch.searchsorted(plan.ranks(dead), prefixes).tolist()
        else:
            ends = [*[0] * (len(plan.prefixes) - 1), len(dead)]
        norms = None
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = forward.dead_decoder_rows.detach().norm(dim=-1)
        groups = itertools.pairwise([0, *ends])
        for residual, (start, end) in zip(forward.levels.residuals, groups, strict=True):
            if start < end:
                # `...` for all of them: the gradient of a slice would be copied
                part = slice(start, end) if self.cfg.use_matryoshka_aux_loss else ...
                part_norms = None if norms is None else norms[part]
                loss = loss + forward.dead_loss(residual, part, part_norms)
        return self.cfg.aux_loss_coefficient * loss

    def _update_statistics(
        self,
        output: TrainStepOutput,
        losses: Float[torch.Tensor, " levels"],
        scores: Float[torch.Tensor, " n"],
        latents: Int[torch.Tensor, " n"],
        plan: StepPlan,
        step: int,
    ) -> None:
        sae_in = output.sae_in.detach()
        start = self.cfg.topk_threshold_start_step
        if start is None or step > start:
            self.update_topk_threshold(scores)
        output.metrics["topk_threshold"] = self.topk_threshold
        self.count_firings(scores, latents, len(sae_in))
        self._sample.add(sae_in, self.joined_batch)
        # with sampled prefixes, no step computes the losses of the levels to be judged
        is_monitored = self.joined_batch.rank == 0 and not self.cfg.is_sampled
        if is_monitored and self._monitor.is_due(step):
            self._monitor.observe(
                losses[self.cfg.bias_level :], scores, plan.ranks(latents), sae_in, step
            )

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[torch.Tensor, " n"]) -> None:
        # as SAELens', without waiting for the device to say whether any score is positive
        before, rate = self.topk_threshold, self.cfg.topk_threshold_lr
        scores = torch.cat([acts_topk.new_full((1,), torch.inf), acts_topk])
        smallest = scores.masked_fill(scores <= 0, torch.inf).min().to(before.dtype)
        smallest = self.joined_batch.min(smallest)
        after = (1 - rate) * before + rate * smallest
        if self.cfg.topk_threshold_start_step is not None:
            after = torch.where(before == 0, smallest, after)  # the first cut it sees
        self.topk_threshold = torch.where(smallest < torch.inf, after, before)

    @override
    @torch.no_grad()
    def join_statistics(self) -> None:
        self._sample.join(self.joined_batch)

    @override
    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        if self._sample.rows is not None:
            x = encoder_input(self, self._sample.rows)
            cut = batch_threshold(x, state_dict["W_enc"], state_dict["b_enc"], self.cfg.k)
            state_dict["threshold"] = torch.full_like(state_dict["threshold"], cut)
        elif self.topk_threshold > 0:
            warnings.warn(
                "This SAE has seen no activation since it was loaded, so its saved threshold is "
                "SAELens' moving average; sae_lens_matryoshka.calibrate_threshold sets it from "
                "activations.",
                stacklevel=3,
            )

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.join_statistics()
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
        self.join_statistics()
        if self._sample.rows is not None:
            rows = self._sample.rows.to(unwhitening_matrix)
            self._sample.replace(rows @ unwhitening_matrix + mean)


def _in_level_order(dead: TrueIndices | None, plan: StepPlan) -> Int[torch.Tensor, " dead"]:
    """The dead latents in level order, so that each level's are a slice of them."""
    if dead is None:
        return torch.empty(0, dtype=torch.long, device=plan.level_of_latent.device)
    latents = dead.get()
    return latents if plan.rank is None else latents[plan.rank[latents].argsort()]
