"""Stopping SAELens' trainer between two steps, and checkpoints that are whole or not there."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_matryoshka.util.files import atomic_folder


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped the training.

    Args:
        signum: The signal.
        message: What was kept, and how to go on.
        checkpoint: The folder to give as `resume_from_checkpoint`; None where nothing was saved.
    """

    def __init__(self, signum: int, message: str, checkpoint: Path | None = None):
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.signum = signum
        self.checkpoint = checkpoint


class InterruptibleFit:
    """`trainer.fit()` that a signal stops only between two steps; its caller restores the handlers.

    `fit` begins each step with `maybe_reset_sparsity`, where all counters agree and no batch is
    drawn, and computes it in `step`; both are public seams of SAELens' trainer.
    """

    def __init__(self, trainer: SAETrainer[TrainingSAE[Any], Any]):
        self._trainer = trainer
        self._begin_step = trainer.maybe_reset_sparsity
        self._compute_step = trainer.step
        self._signum: int | None = None
        self._n_steps_before = n_whole_steps(trainer)
        self._has_begun = False
        self._is_over = False
        self._undo_step: Callable[[], None] | None = None

    def run(self) -> TrainingSAE[Any]:
        trainer = self._trainer
        trainer.maybe_reset_sparsity = self._begin_step_or_stop
        trainer.step = self._step
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        try:
            return trainer.fit()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                _free_memory(trainer, error)
            if self._undo_step is not None:
                self._undo_step()
            if n_whole_steps(trainer) > self._n_steps_before:
                logger.error(_keep(trainer)[1])
            raise
        finally:
            self._is_over = True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._has_begun:
            raise TrainingInterrupted(signum, "stopped before the first step, nothing to save.")
        if self._signum is not None:
            raise TrainingInterrupted(signum, "stopped at once by a second signal, nothing saved.")
        self._signum = signum
        doing = b"Saving the trained SAE" if self._is_over else b"Stopping after this step"
        # Not print or logging: the signal may have come while they were writing.
        os.write(2, b"\n" + doing + b". Another signal stops at once, unsaved.\n")

    def _begin_step_or_stop(self) -> dict[str, Any]:
        if self._signum is not None:
            checkpoint, message = _keep(self._trainer)
            raise TrainingInterrupted(self._signum, message, checkpoint)
        self._undo_step = _undo(self._trainer)
        return self._begin_step()

    def _step(self, batch: torch.Tensor) -> TrainStepOutput:
        self._has_begun = True
        output = self._compute_step(batch)
        self._undo_step = None
        return output


def n_whole_steps(trainer: SAETrainer[TrainingSAE[Any], Any]) -> int:
    """Steps whose weights are in: the schedule's count, the last thing that a step does."""
    return trainer.lr_scheduler.last_epoch


def _undo(trainer: SAETrainer[TrainingSAE[Any], Any]) -> Callable[[], None]:
    """What takes the counters back to now; a step that broke off has not reached the weights."""
    n_training_samples = trainer.n_training_samples
    n_frac_active_samples = trainer.n_frac_active_samples
    act_freq_scores = trainer.act_freq_scores.clone()
    n_forward_passes_since_fired = trainer.n_forward_passes_since_fired.clone()
    buffers = {name: buffer.clone() for name, buffer in trainer.sae.named_buffers()}

    def undo() -> None:
        trainer.n_training_samples = n_training_samples
        trainer.n_frac_active_samples = n_frac_active_samples
        trainer.act_freq_scores = act_freq_scores
        trainer.n_forward_passes_since_fired = n_forward_passes_since_fired
        trainer.sae.load_state_dict(buffers, strict=False)

    return undo


def _free_memory(trainer: SAETrainer[TrainingSAE[Any], Any], error: BaseException | None) -> None:
    """Let go of the step that broke off, since saving takes memory on the device, too."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
    trainer.optimizer.zero_grad()
    torch.cuda.empty_cache()


def _keep(trainer: SAETrainer[TrainingSAE[Any], Any]) -> tuple[Path | None, str]:
    """Save the run as it stands: the checkpoint, if there is one, and what to tell the user."""
    step = n_whole_steps(trainer)
    base = trainer.cfg.checkpoint_path
    if base is None:
        return None, (
            f"nothing of the {step} steps could be kept, because checkpoint_path is not set. With "
            "checkpoint_path set to a folder, a run that is stopped can be gone on with."
        )
    # An upload may fail or hang, and the checkpoint on disk must not depend on it.
    trainer.cfg = replace(trainer.cfg, logger=replace(trainer.cfg.logger, log_to_wandb=False))
    name = str(trainer.n_training_samples)
    checkpoint = (Path(base) / name).resolve()
    try:
        trainer.save_checkpoint(name)
    except Exception as error:
        return None, f"step {step} could not be saved in {checkpoint}: {error}"
    return checkpoint, (
        f"step {step} ({name} training samples) is saved in {checkpoint}. To go on, start the same "
        f"run with --resume_from_checkpoint {checkpoint} (in a config: resume_from_checkpoint)."
    )


def save_whole(
    trainer: SAETrainer[TrainingSAE[Any], Any],
    save: Callable[..., None],
    checkpoint_name: str,
    base_path: Path | str | None = None,
    wandb_aliases: list[str] | None = None,
) -> None:
    """`trainer.save_checkpoint` that leaves a whole checkpoint, or what was there before."""
    base = base_path if base_path is not None else trainer.cfg.checkpoint_path
    if base is None:
        save(checkpoint_name, base_path, wandb_aliases)
        return
    _require_finite(trainer)
    n_training_steps = trainer.n_training_steps
    trainer.n_training_steps = n_whole_steps(trainer)
    try:
        with atomic_folder(Path(base) / checkpoint_name) as unfinished:
            save(unfinished.name, base_path, wandb_aliases)
    finally:
        trainer.n_training_steps = n_training_steps


def _require_finite(trainer: SAETrainer[TrainingSAE[Any], Any]) -> None:
    tensors = dict(trainer.sae.state_dict())
    for name, parameter in trainer.sae.named_parameters():
        for moment, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"Adam's {moment} of {name}"] = value
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{', '.join(broken)} not finite after step {n_whole_steps(trainer)}; a checkpoint of "
            "it would be useless, and earlier ones are left as they are."
        )
