"""The warnings of a training run."""

from __future__ import annotations

import warnings

import torch

from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.diagnosis import Measured, diagnose

# Steps; every later check doubles them. The auxiliary loss begins to revive latents after SAELens'
# dead_feature_window, 1,000 by default, and what it has not done yet is no fault.
FIRST_CHECK = 4000


class TrainingMonitor:
    """Warns of what `diagnose` finds during training, of each kind once.

    It looks after 4,000 steps of the run, 8,000, 16,000 and so on, at the latter half of the steps
    so far, and not before the schedules of k and of the levels' weights have ended.
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
        self._means: torch.Tensor | None = None  # (P + 1,) level losses, variance

    @torch.no_grad()
    def observe(
        self,
        level_losses: torch.Tensor,
        active_scores: torch.Tensor,
        active_latents: torch.Tensor,
        sae_in: torch.Tensor,
        step: int,
    ) -> None:
        """Take one training step, and warn if it is time to look and something is found.

        Args:
            level_losses: (P,) as `Levels.losses`.
            active_scores: (n,) as `CodeStats.add`.
            active_latents: (n,) int64.
            sae_in: (B, d_in).
            step: Steps of the run before this one, those before it was resumed too.
        """
        while step >= self._next_check or step < self._settled > self._next_check // 2:
            self._next_check *= 2
        if step < self._next_check // 2:  # a start from random weights says little
            return
        self._codes.add(active_scores, active_latents, len(sae_in), self._cfg.d_sae)
        x = sae_in.float()
        variance = (x - x.mean(0)).pow(2).sum(-1).mean()
        means = torch.cat([level_losses.float(), variance[None]])
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
            # A baseline is trained to the end: the first check can't tell where this run will be,
            baseline_explained_variance=None
            if before is None
            else self._cfg.baseline_explained_variance,
            # and twice the steps so far add what the last doubling did, at most.
            expected_gain=0.0 if before is None else max(0.0, reached - before),
        )
        self._explained_variance = reached
        for kind, message in diagnose(measured):
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(
                    f"After {n_steps:,} training steps: {message}",
                    stacklevel=6,  # the caller of training_forward_pass
                )
