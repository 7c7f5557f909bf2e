"""The warnings of a training run."""

import warnings

import torch
from jaxtyping import Float, Int

from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.diagnosis import Measured, diagnose

# In steps; every later check comes after twice as many. The auxiliary loss starts to revive latents
# after SAELens' dead_feature_window, 1,000 by default, and a check needs to see what it has done.
FIRST_CHECK = 4000
OBSERVED_EVERY = 16  # steps; divides FIRST_CHECK


class TrainingMonitor:
    """Warns of what `diagnose` finds during training, once for each kind of finding.

    It checks after 4,000 steps of the run, 8,000, 16,000 and so on, from every 16th step of the
    latter half of the steps so far, and not before the schedules of k and of the levels' weights
    have ended.

    Args:
        cfg: Config of the SAE in training.
    """

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig) -> None:
        self._cfg = cfg
        self._settled = max(
            cfg.k_anneal_steps,
            cfg.inner_fade_start + cfg.inner_fade_steps if cfg.inner_weight_end < 1 else 0,
        )
        self._next_check = FIRST_CHECK
        self._explained_variance: float | None = None  # at the last check
        self._warned: set[str] = set()
        self._start_window()

    def _start_window(self) -> None:
        self._codes = CodeStats()
        self._n_batches = 0
        self._means: torch.Tensor | None = None  # (P + 1,) losses of the levels, variance

    def is_due(self, step: int) -> bool:
        """Whether `observe` is to see this step.

        Args:
            step: Steps of the run before this one, those before it was resumed included.
        """
        while step >= self._next_check or step < self._settled > self._next_check // 2:
            self._next_check *= 2
        # the first half says little: a run starts from random weights
        return step >= self._next_check // 2 and (step + 1) % OBSERVED_EVERY == 0

    @torch.no_grad()
    def observe(
        self,
        losses: Float[torch.Tensor, " levels"],
        scores: Float[torch.Tensor, " n"],
        latents: Int[torch.Tensor, " n"],
        sae_in: Float[torch.Tensor, "batch d_in"],
        step: int,
    ) -> None:
        """Add a step that is due, and warn of what is found if it completes a window.

        Args:
            losses: Squared error of each level, as in `LevelLosses`.
            scores: Scores of the codes, 0 for padding.
            latents: Latents of the codes, numbered in level order.
            sae_in: The activations.
            step: Step as in `is_due`.
        """
        self._codes.add(scores, latents, len(sae_in), self._cfg.d_sae)
        x = sae_in.float()
        variance = (x - x.mean(0)).pow(2).sum(-1).mean()
        means = torch.cat([losses.float(), variance[None]])
        self._n_batches += 1
        self._means = means if self._means is None else self._means.lerp(means, 1 / self._n_batches)
        if step + 1 == self._next_check:
            self._check(self._means, step + 1)
            self._next_check *= 2
            self._start_window()

    def _check(self, means: torch.Tensor, n_steps: int) -> None:
        *losses, variance = means.tolist()
        explained_variance = [1 - loss / variance if variance else 0.0 for loss in losses]
        rates = self._codes.firing_rates
        reached, before = explained_variance[-1], self._explained_variance
        widths = self._cfg.matryoshka_widths
        measured = Measured(
            widths=widths,
            explained_variance=explained_variance,
            l0=[rates[:width].sum().item() for width in widths],
            firing_rates=rates,
            n_tokens=self._codes.n_tokens,
            weak_score=self._codes.weak_score,
            weak_half=self._codes.weak_half,
            k=self._cfg.k,
            is_ordered_by_frequency=self._cfg.latent_order == "frequency",
            # a baseline is trained to the end, and one check can't tell where this run will end
            baseline_explained_variance=None
            if before is None
            else self._cfg.baseline_explained_variance,
            # twice the steps add at most what the last doubling did
            expected_gain=0.0 if before is None else max(0.0, reached - before),
        )
        self._explained_variance = reached
        for kind, message in diagnose(measured):
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(
                    f"After {n_steps:,} training steps: {message}",
                    stacklevel=7,  # the step of our trainer, if it is the one
                )
