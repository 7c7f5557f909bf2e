"""Training runs that can be stopped, or break off, and be gone on with as if they had not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, logger
from sae_lens.config import HfDataset
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError, safe_open
from typing_extensions import override

if TYPE_CHECKING:  # transformer-lens 2 and 3 keep it in different modules
    from transformer_lens.HookedRootModule import HookedRootModule

_RESUME_FILES = (
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
)
# These two are estimated before the first step and folded into the weights after the last.
_FOLDED_NORMALIZATIONS = ("expected_average_only_in", "covariance_whitening")


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


class MatryoshkaTrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' training runner, whose runs lose no step to a signal or an exception.

    The first SIGINT or SIGTERM lets the step in progress finish, saves a full checkpoint under
    `checkpoint_path/<n_training_samples>` and raises `TrainingInterrupted`. A second one, or one
    before the first step, raises it at once. An exception during training saves the last whole step
    the same way and goes on its way. Every checkpoint appears under its name only when it is whole
    and its weights are finite. Going on restores weights, moments, threshold and counters; the
    activation store goes on behind the texts it has read, so activations it still held are skipped.

    Args:
        cfg: The run, as for SAELens' runner.
        override_dataset: Used instead of `cfg.dataset_path`.
        override_model: Used instead of `cfg.model_name`.
        override_sae: Used instead of a new SAE of `cfg.sae`.

    Raises:
        ValueError: `cfg.resume_from_checkpoint` cannot be gone on with; before the model is loaded.
    """

    @override
    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ):
        check_resumable(cfg)
        super().__init__(cfg, override_dataset, override_model, override_sae)

    @override
    def run(self) -> TrainingSAE[Any]:
        if self.cfg.resume_from_checkpoint is not None:
            # SAELens would do this beside its prefetching thread, both drawing from one generator.
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
        return super().run()

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[TrainingSAE[Any], Any]
    ) -> TrainingSAE[Any]:
        # A resumed trainer would save one more checkpoint for each threshold it has passed.
        trainer.checkpoint_thresholds = [
            samples
            for samples in trainer.checkpoint_thresholds
            if samples >= trainer.n_training_samples
        ]
        # SAELens saves its own checkpoints of a step before it counts that step.
        trainer.n_training_steps = _n_whole_steps(trainer)
        trainer.save_checkpoint = partial(_save_whole, trainer, trainer.save_checkpoint)
        return _InterruptibleFit(trainer).run()


def check_resumable(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Check that `cfg.resume_from_checkpoint`, if set, is a checkpoint this run can go on with.

    Raises:
        ValueError: the folder or a file in it is missing, broken, of another SAE, or of a finished
            training.
    """
    if cfg.resume_from_checkpoint is None:
        return
    folder = Path(cfg.resume_from_checkpoint)
    given = f"resume_from_checkpoint={cfg.resume_from_checkpoint!r}"
    if not folder.is_dir():
        raise ValueError(f"{given} is not a folder; accepted: a checkpoint of an earlier run.")
    missing = [name for name in _RESUME_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{given} is not a whole checkpoint: it lacks {', '.join(missing)}. A run that plain "
            "SAELens saved when it was interrupted holds no weights and cannot be gone on with."
        )
    try:
        with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt") as weights:
            d_sae, d_in = weights.get_slice("W_dec").get_shape()
    except SafetensorError as error:
        raise ValueError(f"{given}: {SAE_WEIGHTS_FILENAME} is broken ({error}).") from error
    if (d_in, d_sae) != (cfg.sae.d_in, cfg.sae.d_sae):
        raise ValueError(
            f"{given} holds an SAE of d_in={d_in} and d_sae={d_sae}; the config has "
            f"sae.d_in={cfg.sae.d_in} and sae.d_sae={cfg.sae.d_sae}."
        )
    scaler = json.loads((folder / ACTIVATION_SCALER_CFG_FILENAME).read_text())
    is_scaled = scaler["scaling_factor"] is not None or scaler.get("has_whitening", False)
    if cfg.sae.normalize_activations in _FOLDED_NORMALIZATIONS and not is_scaled:
        raise ValueError(
            f"{given} holds a finished SAE: its activation normalization is folded into the "
            "weights. Accepted: a checkpoint saved during training."
        )


class _InterruptibleFit:
    """`trainer.fit()` that a signal stops only between two steps.

    `fit` begins each step with `maybe_reset_sparsity`, where all counters agree and no batch is
    drawn, and computes it in `step`; both are public seams of SAELens' trainer.
    """

    def __init__(self, trainer: SAETrainer[TrainingSAE[Any], Any]):
        self._trainer = trainer
        self._begin_step = trainer.maybe_reset_sparsity
        self._compute_step = trainer.step
        self._signum: int | None = None
        self._n_steps_before = _n_whole_steps(trainer)
        self._has_begun = False
        self._undo_step: Callable[[], None] | None = None

    def run(self) -> TrainingSAE[Any]:
        trainer = self._trainer
        trainer.maybe_reset_sparsity = self._begin_step_or_stop
        trainer.step = self._step
        previous = {
            signum: signal.signal(signum, self._on_signal)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return trainer.fit()
        except Exception:
            if self._undo_step is not None:
                self._undo_step()
            if _n_whole_steps(trainer) > self._n_steps_before:
                logger.error(_keep(trainer)[1])
            raise
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._has_begun:
            raise TrainingInterrupted(signum, "stopped before the first step, nothing to save.")
        if self._signum is not None:
            raise TrainingInterrupted(signum, "stopped at once by a second signal, nothing saved.")
        self._signum = signum
        # Not print or logging: the signal may have come while they were writing.
        os.write(2, b"\nStopping after this step. Another signal stops at once, unsaved.\n")

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


def _n_whole_steps(trainer: SAETrainer[TrainingSAE[Any], Any]) -> int:
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


def _keep(trainer: SAETrainer[TrainingSAE[Any], Any]) -> tuple[Path | None, str]:
    """Save the run as it stands: the checkpoint, if there is one, and what to tell the user."""
    step = _n_whole_steps(trainer)
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


def _save_whole(
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
    checkpoint = Path(base) / checkpoint_name
    unfinished = checkpoint.with_name(f".{checkpoint_name}.unfinished")
    replaced = checkpoint.with_name(f".{checkpoint_name}.replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    n_training_steps = trainer.n_training_steps
    trainer.n_training_steps = _n_whole_steps(trainer)
    try:
        save(unfinished.name, base_path, wandb_aliases)
        if checkpoint.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            checkpoint.rename(replaced)
        unfinished.rename(checkpoint)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        trainer.n_training_steps = n_training_steps
        shutil.rmtree(unfinished, ignore_errors=True)


def _require_finite(trainer: SAETrainer[TrainingSAE[Any], Any]) -> None:
    tensors = dict(trainer.sae.state_dict())
    for name, parameter in trainer.sae.named_parameters():
        for moment, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"Adam's {moment} of {name}"] = value
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{', '.join(broken)} not finite after step {_n_whole_steps(trainer)}; a checkpoint of "
            "it would be useless, and earlier ones are left as they are."
        )
