"""SAELens' training runner, timed: a run, and each part of it."""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from sae_lens_matryoshka.training.monitoring import FIRST_CHECK

MODEL, STORE, SAE_STEP, OPTIMIZER, REST = PARTS = (
    "language model",
    "activation store",
    "SAE step",
    "optimizer",
    "rest",
)
N_WARM_UP_STEPS = 8
# From here on the monitor of our SAEs observes steps, and no window of statistics ends.
FIRST_STEP = FIRST_CHECK // 2 + 1


class PartTimer:
    """Attributes the time from `start` to `stop` to the innermost timed call.

    Args:
        rest: The part for time outside all timed calls.
        synchronize: Waits for the device; called where a part begins or ends.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        rest: str,
        synchronize: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.seconds: dict[str, float] = {}
        self.running = False
        self._synchronize = synchronize
        self._clock = clock
        self._parts = [rest]
        self._since = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def start(self) -> None:
        self._synchronize()
        self.running, self._since = True, self._clock()

    def stop(self) -> None:
        self._attribute()
        self.running = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time attributed to `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            self._attribute()
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._attribute()
                self._parts.pop()

        return call

    def _attribute(self) -> None:
        """Add the time since the last boundary to the current part."""
        self._synchronize()
        now = self._clock()
        part = self._parts[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


@dataclass
class Run:
    """Measurements of one run, without set-up and warm-up."""

    contestant: str
    tokens: int  # that the SAE was trained on
    seconds: float
    parts: dict[str, float] | None = None  # seconds of each; None in an undisturbed run
    language_model_tokens: int | None = None  # that the model read, in a run by parts


class MeasuringRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner; times the training loop and, if `by_parts`, the calls in it."""

    timer: PartTimer
    by_parts: bool
    tokens = 0
    language_model_tokens = 0

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        log_sparsity = trainer.full_sparsity_window_log
        trainer.n_training_steps = FIRST_STEP

        # The trainer calls this before every step, and once after the last.
        def at_boundary() -> dict[str, Any]:
            if trainer.n_training_steps == FIRST_STEP + N_WARM_UP_STEPS:
                self.tokens = -trainer.n_training_samples
                self.timer.start()
            elif trainer.n_training_samples >= trainer.cfg.total_training_samples:
                self.timer.stop()
                self.tokens += trainer.n_training_samples
            return log_sparsity()

        trainer.full_sparsity_window_log = at_boundary
        with contextlib.ExitStack() as patches:
            if self.by_parts:
                self._time_parts(trainer, patches)
            return super().run_trainer_with_interruption_handling(trainer)

    def _time_parts(self, trainer: SAETrainer[Any, Any], patches: contextlib.ExitStack) -> None:
        run_with_cache, store = self.model.run_with_cache, trainer.data_provider

        def read(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.timer.running:
                self.language_model_tokens += tokens.numel()
            return run_with_cache(tokens, *args, **kwargs)

        def batches() -> Any:
            next_batch = self.timer.timed(STORE, functools.partial(next, store))
            while True:
                yield next_batch()

        trainer.data_provider = batches()
        for part, owner, name, function in (
            (MODEL, self.model, "run_with_cache", read),
            (SAE_STEP, trainer.sae, "training_forward_pass", None),
            (SAE_STEP, torch.Tensor, "backward", None),
            (OPTIMIZER, torch.nn.utils, "clip_grad_norm_", None),
            (OPTIMIZER, trainer.optimizer, "step", None),
            (OPTIMIZER, trainer.optimizer, "zero_grad", None),
            (OPTIMIZER, trainer.lr_scheduler, "step", None),
        ):
            timed = self.timer.timed(part, function or getattr(owner, name))
            patches.enter_context(patch.object(owner, name, timed))
