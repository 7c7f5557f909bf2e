"""What the training SAEs of this package have in common: the nested objective over their codes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_matryoshka.kernels.dispatch import Kernels, kernels_for
from sae_lens_matryoshka.kernels.layout import Layout
from sae_lens_matryoshka.kernels.selection import Codes
from sae_lens_matryoshka.kernels.transfers import to_device
from sae_lens_matryoshka.training.latent_order import (
    in_order,
    level_order,
    ranks_of,
    update_rates,
)
from sae_lens_matryoshka.training.objective import (
    Levels,
    decode_nested,
    reference_levels,
    reference_reconstructions,
)
from sae_lens_matryoshka.training.prefixes import level_table


class Plan(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        prefixes: Prefix lengths of the P levels, ascending; 0 is that of b_dec alone.
        weights: c_p of each.
        order: (d_sae,) latents in level order, or None where that is the order of their indices.
        ranks: (d_sae,) the place of each latent in `order`, or None.
        levels: (d_sae,) int32, the level of each latent.
    """

    prefixes: list[int]
    weights: list[float]
    order: torch.Tensor | None
    ranks: torch.Tensor | None
    levels: torch.Tensor


class NestedTrainingSAE(TrainingSAE[Any]):
    """The nested objective for a training SAE of SAELens, whose class comes behind this one."""

    firing_rates: torch.Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._projected_decoder: weakref.ref[torch.Tensor] | None = None
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
                _divide_by_norms(self.W_dec)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = rows_contiguous(state_dict["W_enc"])

    @override
    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        rates = state_dict.pop("firing_rates", None)
        if self.cfg.decoder_norm == "unit":
            state_dict["W_dec"] = _divide_by_norms(state_dict["W_dec"].clone())
        super().process_state_dict_for_saving_inference(state_dict)
        if rates is not None:
            reordered = in_order(state_dict, level_order(rates))
            state_dict.update({name: tensor.contiguous() for name, tensor in reordered.items()})

    def plan(self, step: int) -> Plan:
        """What the loss of a step is made of."""
        order = self.level_order()
        ranks = None if order is None else ranks_of(order)
        prefixes = self.cfg.prefixes_at(step)
        levels = level_table(tuple(prefixes), self.W_dec.device)
        return Plan(
            prefixes=prefixes,
            weights=self.cfg.weights_at(step),
            order=order,
            ranks=ranks,
            levels=levels if ranks is None else levels[ranks],
        )

    def level_order(self) -> torch.Tensor | None:
        """(d_sae,) latents in level order, or None where that is the order of their indices."""
        return level_order(self.firing_rates) if self.cfg.latent_order == "frequency" else None

    def is_hooked(self, *points: torch.nn.Module) -> bool:
        """Whether a hook is there to see, or to change, the dense tensors of a step."""
        return any(
            point._forward_hooks or point._forward_pre_hooks or point._backward_hooks
            for point in points
        )

    def kernels(self, sae_in: torch.Tensor) -> Kernels | None:
        """Who computes a step on `sae_in` from the codes alone; None where the reference does."""
        if self.cfg.normalizes_per_row or self.is_hooked(self.hook_sae_recons):
            return None
        return kernels_for(self.cfg.implementation, sae_in.device, self.W_dec.dtype)

    def hold_decoder_norm(self) -> None:
        """Before a forward pass: give decoder rows and their gradient what `decoder_norm` says."""
        if self.cfg.decoder_norm == "free":
            return
        if self.cfg.decoder_norm == "unit":
            with torch.no_grad():
                _divide_by_norms(self.W_dec)
        projected = self._projected_decoder and self._projected_decoder()
        # loading puts another parameter there
        if projected is not self.W_dec and self.W_dec.requires_grad:
            self.W_dec.register_post_accumulate_grad_hook(self._project_decoder_gradient)
            self._projected_decoder = weakref.ref(self.W_dec)

    @torch.no_grad()
    def _project_decoder_gradient(self, W_dec: torch.Tensor) -> None:
        if self.cfg.decoder_norm == "unit_at_update":
            _divide_by_norms(W_dec)
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec

    def dense_levels(self, acts: torch.Tensor, sae_in: torch.Tensor, plan: Plan) -> Levels:
        """The levels as the paper writes them, from dense factors (B, d_sae) of the decoder."""
        W_dec = self.W_dec
        if plan.order is not None:
            acts, W_dec = acts[:, plan.order], W_dec[plan.order]
        *inner, outermost = reference_reconstructions(
            acts, W_dec, self.b_dec, plan.prefixes, self.cfg.stop_gradient
        )
        reconstructions = torch.stack([*inner, self.hook_sae_recons(outermost)])
        return reference_levels(self.run_time_activation_norm_fn_out(reconstructions), sae_in)

    def sparse_levels(
        self,
        acts: torch.Tensor,
        sae_in: torch.Tensor,
        plan: Plan,
        layout: Layout,
        dead: torch.Tensor,
        kernels: Kernels,
    ) -> tuple[Levels, torch.Tensor]:
        """The same from the factors (n,) of codes, and the decoder rows of the `dead` latents."""
        return decode_nested(
            acts,
            self.W_dec,
            self.b_dec,
            sae_in,
            layout,
            len(plan.prefixes),
            dead,
            self.cfg.stop_gradient,
            kernels,
        )

    def in_level_order(
        self, codes: Codes, batch_size: int, plan: Plan, kernels: Kernels
    ) -> tuple[Codes, Layout]:
        """The codes by row and within a row by level, and their layout."""
        return kernels.order(codes, batch_size, plan.levels, len(plan.prefixes), plan.ranks is None)

    def total_loss(self, levels: Levels, plan: Plan) -> torch.Tensor:
        """Σ_p c_p L_p."""
        if all(weight == 1 for weight in plan.weights):
            return levels.losses.sum()
        weights = to_device(plan.weights, levels.losses.dtype, levels.losses.device)
        return (levels.losses * weights).sum()

    def named_losses(self, levels: Levels, plan: Plan) -> dict[str, torch.Tensor]:
        """Each level's squared error, without its weight, under the names of SAELens."""
        *inner, outermost = levels.losses
        named = {"mse_loss": outermost}
        if self.cfg.bias_level and inner:
            named["bias_mse_loss"], *inner = inner
        if not self.cfg.is_sampled:
            widths = self.cfg.matryoshka_widths
            named |= {
                f"inner_mse_loss_{width}": loss for width, loss in zip(widths, inner, strict=False)
            }
        elif inner:
            named["inner_mse_loss_mean"] = torch.stack(inner).mean()
        return named

    def count_firings(self, active: torch.Tensor, latents: torch.Tensor, batch_size: int) -> None:
        """Take a batch's codes into account for the order of the next step.

        Args:
            active: (n,) scores, 0 where a code only fills up.
            latents: (n,) latents of the codes.
            batch_size: B.
        """
        if self.cfg.latent_order == "frequency":
            self.firing_rates = update_rates(self.firing_rates, latents, active != 0, batch_size)

    def level_metrics(
        self,
        step_input: TrainStepInput,
        losses: torch.Tensor,
        active: torch.Tensor,
        active_latents: torch.Tensor,
        plan: Plan,
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """Variance explained, mean L0 and dead latents of each level, computed when called.

        Args:
            step_input: Of the step.
            losses: (P,) squared error of each level of `cfg.matryoshka_widths`.
            active: (n,) scores of the codes, 0 where one only fills up.
            active_latents: (n,) latents of the codes.
            plan: Of the step.
        """
        # SAELens promotes likewise: sums of squares in 16 bits are too coarse
        sae_in = step_input.sae_in.to(torch.promote_types(step_input.sae_in.dtype, torch.float32))
        dead = step_input.dead_neuron_mask
        if plan.order is not None and plan.ranks is not None:
            active_latents = plan.ranks[active_latents]
            dead = None if dead is None else dead[plan.order]

        @cache
        def variance() -> torch.Tensor:
            return (sae_in - sae_in.mean(0)).pow(2).sum(-1).mean()

        def explained_variance(level_loss: torch.Tensor) -> torch.Tensor:
            return 1 - level_loss / variance()

        def l0(width: int) -> torch.Tensor:
            return ((active_latents < width) & (active != 0)).sum() / len(sae_in)

        metrics: dict[str, Callable[[], torch.Tensor]] = {}
        for width, loss in zip(self.cfg.matryoshka_widths, losses, strict=True):
            metrics[f"explained_variance_level_{width}"] = partial(explained_variance, loss)
            metrics[f"l0_level_{width}"] = partial(l0, width)
            if dead is not None:
                metrics[f"dead_latents_level_{width}"] = dead[:width].sum
        return metrics

    @torch.no_grad()
    def measured_losses(self, acts: torch.Tensor, sae_in: torch.Tensor, plan: Plan) -> torch.Tensor:
        """(P,) squared error of each level of `cfg.matryoshka_widths`, whatever was drawn.

        Args:
            acts: (B, d_sae) factors of the decoder.
            sae_in: (B, d_in).
            plan: Of the step.
        """
        return self.dense_levels(
            acts, sae_in, plan._replace(prefixes=self.cfg.matryoshka_widths)
        ).losses

    def require_finite(self, output: TrainStepOutput, step_input: TrainStepInput) -> None:
        """Check that the loss is finite.

        Raises:
            ValueError: it is not, naming the first tensor that was not.
        """
        if not output.loss.isfinite():
            losses = {**output.losses, "the sum of losses": output.loss}
            raise ValueError(self._not_finite(step_input, losses))

    def _not_finite(self, step_input: TrainStepInput, losses: dict[str, Any]) -> str:
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


def rows_contiguous(W_enc: torch.Tensor) -> torch.Tensor:
    """W_enc (d_in, d_sae) with each latent's encoder row contiguous, as its gradient is written."""
    return W_enc.T.contiguous().T


def _divide_by_norms(W_dec: torch.Tensor) -> torch.Tensor:
    return W_dec.div_(W_dec.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(W_dec.dtype).tiny))
