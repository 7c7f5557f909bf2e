"""What the training SAEs of this package share: the plan of a step, its losses and metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_matryoshka.kernels.dispatch import Backend, backend_for
from sae_lens_matryoshka.kernels.transfers import ToHost, to_device
from sae_lens_matryoshka.training.decoder_norm import DecoderNormConstraint, set_norms_to_1
from sae_lens_matryoshka.training.joined_batch import JoinedBatch
from sae_lens_matryoshka.training.latent_order import level_order, rank_of, update_rates
from sae_lens_matryoshka.training.objective import (
    LevelLosses,
    reference_losses,
    reference_reconstructions,
)
from sae_lens_matryoshka.training.prefixes import level_of_latent
from sae_lens_matryoshka.training.saving import SavedTrainingSAE, rows_contiguous


class StepPlan(NamedTuple):
    """What the loss of one step is made of.

    Attributes:
        prefixes: Prefix lengths of the P levels, ascending; 0 is that of b_dec alone.
        weights: c_p of each level.
        order: (d_sae,) latents in level order, or None if that is the order of their indices.
        rank: (d_sae,) position of each latent in `order`, or None.
        level_of_latent: (d_sae,) int32.
    """

    prefixes: list[int]
    weights: list[float]
    order: torch.Tensor | None
    rank: torch.Tensor | None
    level_of_latent: torch.Tensor

    def ranks(self, latents: Int[torch.Tensor, " n"]) -> Int[torch.Tensor, " n"]:
        """The position of each of `latents` in level order."""
        return latents if self.rank is None else self.rank[latents]


@dataclass
class DeferringStepInput(TrainStepInput):
    """The input of a step whose trainer calls `before_update` once it has the gradients.

    Until then the host need not know whether the loss is finite, and launches the backward pass
    while the device computes the forward pass.
    """

    before_update: list[Callable[[], None]] = field(default_factory=list)


class NestedTrainingSAE(SavedTrainingSAE):
    """The nested objective, to stand before a training SAE of SAELens among the base classes."""

    firing_rates: torch.Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._decoder_norm = DecoderNormConstraint(cfg.decoder_norm)
        self.joined_batch = JoinedBatch()
        if cfg.latent_order == "frequency":
            rates = torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device)
            self.register_buffer("firing_rates", rates)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = rows_contiguous(self.W_enc.data)
        self.b_enc.requires_grad_(self.cfg.encoder_bias)
        if self.cfg.decoder_norm != "free":
            with torch.no_grad():
                set_norms_to_1(self.W_dec)

    def split_batches(self, group: dist.ProcessGroup) -> None:
        """Train on the joined batch of several processes, each of which has as many rows of it.

        The gradients are left to the trainer: those of the joined batch are the processes' mean.
        """
        self.joined_batch = JoinedBatch(group)

    def join_statistics(self) -> None:
        """Give every process what the saved SAE depends on besides weights and buffers."""

    def level_order(self) -> Int[torch.Tensor, " d_sae"] | None:
        """Latents in level order, or None if that is the order of their indices."""
        return level_order(self.firing_rates) if self.cfg.latent_order == "frequency" else None

    def plan_step(self, step: int) -> StepPlan:
        """What the loss of a training step is made of."""
        order = self.level_order()
        rank = None if order is None else rank_of(order)
        prefixes = self.cfg.prefixes_at(step)
        levels = level_of_latent(tuple(prefixes), self.W_dec.device)
        return StepPlan(
            prefixes=prefixes,
            weights=self.cfg.weights_at(step),
            order=order,
            rank=rank,
            level_of_latent=levels if rank is None else levels[rank],
        )

    def backend(
        self, sae_in: Float[torch.Tensor, "batch d_in"], *dense_hook_points: torch.nn.Module
    ) -> Backend | None:
        """What computes a step from its codes; None where only the dense reference can.

        A hook on one of `dense_hook_points`, or on the reconstruction, sees dense tensors, which
        only the reference computes.
        """
        is_hooked = any(
            point._forward_hooks or point._forward_pre_hooks or point._backward_hooks
            for point in (self.hook_sae_recons, *dense_hook_points)
        )
        if is_hooked or sae_in.requires_grad or self.cfg.normalizes_per_row:
            return None
        return backend_for(self.cfg.implementation, sae_in.device, self.W_dec.dtype)

    def reference_levels(
        self,
        acts: Float[torch.Tensor, "batch d_sae"],
        sae_in: Float[torch.Tensor, "batch d_in"],
        plan: StepPlan,
    ) -> LevelLosses:
        """The objective as the paper writes it, from dense factors `acts` of the decoder rows."""
        W_dec = self.W_dec
        if plan.order is not None:
            acts, W_dec = acts[:, plan.order], W_dec[plan.order]
        *inner, outermost = reference_reconstructions(
            acts, W_dec, self.b_dec, plan.prefixes, self.cfg.stop_gradient
        )
        reconstructions = torch.stack([*inner, self.hook_sae_recons(outermost)])
        return reference_losses(self.run_time_activation_norm_fn_out(reconstructions), sae_in)

    def total_loss(self, levels: LevelLosses, plan: StepPlan) -> Float[torch.Tensor, ""]:
        """Σ_p c_p L_p."""
        if all(weight == 1 for weight in plan.weights):
            return levels.losses.sum()
        weights = to_device(plan.weights, levels.losses.dtype, levels.losses.device)
        return (levels.losses * weights).sum()

    def named_losses(self, levels: LevelLosses) -> dict[str, torch.Tensor]:
        """The squared error of each level, unweighted, under SAELens' names."""
        *inner, outermost = levels.losses
        named = {"mse_loss": outermost}
        if self.cfg.bias_level and inner:
            named["bias_mse_loss"], *inner = inner
        if self.cfg.is_sampled:
            if inner:
                named["inner_mse_loss_mean"] = torch.stack(inner).mean()
            return named
        widths = self.cfg.matryoshka_widths
        inner_losses = zip(widths, inner, strict=False)
        return named | {f"inner_mse_loss_{width}": loss for width, loss in inner_losses}

    def count_firings(
        self, scores: Float[torch.Tensor, " n"], latents: Int[torch.Tensor, " n"], batch_size: int
    ) -> None:
        """Update the firing rates that order the latents of the next step; padding has score 0."""
        if self.cfg.latent_order == "frequency":
            self.firing_rates = update_rates(
                self.firing_rates, latents, scores != 0, batch_size, self.joined_batch
            )

    def level_metrics(
        self,
        step_input: TrainStepInput,
        losses: Float[torch.Tensor, " levels"],
        scores: Float[torch.Tensor, " n"],
        latents: Int[torch.Tensor, " n"],
        plan: StepPlan,
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """Variance explained, mean L0 and dead latents of each level, computed when called.

        `losses` are those of the levels of `cfg.matryoshka_widths`; padding has score 0.
        """
        # as SAELens promotes: sums of squares in 16 bits are too coarse
        sae_in = step_input.sae_in.to(torch.promote_types(step_input.sae_in.dtype, torch.float32))
        ranks, dead = plan.ranks(latents), step_input.dead_neuron_mask
        if dead is not None and plan.order is not None:
            dead = dead[plan.order]

        @cache
        def variance() -> torch.Tensor:
            return (sae_in - sae_in.mean(0)).pow(2).sum(-1).mean()

        def explained_variance(loss: torch.Tensor) -> torch.Tensor:
            return 1 - loss / variance()

        def l0(width: int) -> torch.Tensor:
            return ((ranks < width) & (scores != 0)).sum() / len(sae_in)

        metrics: dict[str, Callable[[], torch.Tensor]] = {}
        for width, loss in zip(self.cfg.matryoshka_widths, losses, strict=True):
            metrics[f"explained_variance_level_{width}"] = partial(explained_variance, loss)
            metrics[f"l0_level_{width}"] = partial(l0, width)
            if dead is not None:
                metrics[f"dead_latents_level_{width}"] = dead[:width].sum
        return metrics

    @torch.no_grad()
    def measured_losses(
        self,
        levels: LevelLosses,
        acts: Float[torch.Tensor, "batch d_sae"],
        sae_in: Float[torch.Tensor, "batch d_in"],
        plan: StepPlan,
    ) -> Float[torch.Tensor, " levels"]:
        """Squared error of each level of `cfg.matryoshka_widths`, with sampled prefixes as well.

        Only sampled prefixes need `acts`, the factors of the decoder rows, dense or sparse.
        """
        if not self.cfg.is_sampled:
            return levels.losses.detach()[self.cfg.bias_level :]
        fixed = plan._replace(prefixes=self.cfg.matryoshka_widths)
        return self.reference_levels(acts.to_dense(), sae_in, fixed).losses

    def finish_forward(
        self,
        output: TrainStepOutput,
        step_input: TrainStepInput,
        update_statistics: Callable[[], None],
    ) -> None:
        """Check that the loss is finite, then `update_statistics`; both later for our trainer.

        Raises:
            ValueError: the loss is not finite on some process.
        """
        is_finite = ToHost(self.joined_batch.by_rank(output.loss.detach().isfinite().long()))
        step = step_input.n_training_steps

        # without `step_input`, which would be a cycle that keeps a failed step's memory
        def finish() -> None:
            self.require_finite(is_finite.get(), output, step)
            update_statistics()

        # with "unit_at_update" the backward pass changes W_dec, which a failed step must not
        can_wait = self.cfg.decoder_norm != "unit_at_update"
        if can_wait and isinstance(step_input, DeferringStepInput):
            step_input.before_update.append(finish)
        else:
            finish()

    def require_finite(
        self, is_finite: Int[torch.Tensor, " ranks"], output: TrainStepOutput, step: int
    ) -> None:
        """Check that the loss is finite on every process, from what each says about its own.

        Raises:
            ValueError: it is not; the message names the first tensor that is not, or the process.
        """
        if is_finite.all():
            return
        unchanged = (
            "No weight was changed by this batch, and checkpoints saved before it are intact."
        )
        stopped = f"Training stopped at step {step}: "
        rank = int(is_finite.argmin())
        if rank != self.joined_batch.rank:
            raise ValueError(f"{stopped}the loss of rank {rank} is not finite. {unchanged}")
        tensors = {
            "sae_in (the activations)": output.sae_in,
            **{f"the parameter {name}": value for name, value in self.named_parameters()},
            **output.losses,
            "the sum of losses": output.loss,
        }
        name, value = next(
            (name, value)
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor) and not value.isfinite().all()
        )
        n_nan, n_inf = int(value.isnan().sum()), int(value.isinf().sum())
        raise ValueError(
            f"{stopped}{name}, of shape {tuple(value.shape)}, holds {n_nan} NaN and {n_inf} "
            f"infinite values{self.joined_batch.on_rank}. {unchanged}"
        )
