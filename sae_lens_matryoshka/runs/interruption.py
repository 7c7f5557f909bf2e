"""Stop SAELens' trainer between two steps, and write complete checkpoints or none."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from sae_lens import logger

from sae_lens_matryoshka.runs.processes import AgreedStop, Processes
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from sae_lens_matryoshka.training.latent_order import reorder_latents
from sae_lens_matryoshka.util.files import atomic_folder

if TYPE_CHECKING:
    from sae_lens_matryoshka.runs.lockstep import LockstepTrainer


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped the training.

    Args:
        signum: The signal.
        message: What was saved, and how to resume.
        checkpoint: The folder to give as `resume_from_checkpoint`; None if nothing was saved.
    """

    def __init__(self, signum: int, message: str, checkpoint: Path | None = None):
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.signum = signum
        self.checkpoint = checkpoint


_NOTHING_TO_SAVE = "stopped before the first step, nothing to save."


class InterruptibleFit:
    """`trainer.fit()` that a signal stops only between two steps; the caller restores the handlers.

    `fit` begins each step with `maybe_reset_sparsity`, when all counters agree and no batch is
    drawn yet, and computes it in `step`; both are public methods of SAELens' trainer. Several
    processes stop where they agree to, when they draw their batches.
    """

    def __init__(
        self,
        trainer: "MatryoshkaTrainer | LockstepTrainer",
        processes: Processes | None = None,
    ):
        self._trainer: Any = trainer
        self._processes = processes
        self._begin_step = trainer.maybe_reset_sparsity
        self._compute_step = trainer.step
        self._signum: int | None = None
        self._activity: bytes | None = None  # what a signal waits for; None before the first step
        self._undo_step: Callable[[], object] | None = None

    def run(self) -> Any:
        """What `fit` returns."""
        trainer = self._trainer
        n_steps_before = n_completed_steps(trainer)
        trainer.maybe_reset_sparsity = self._begin_step_or_stop
        trainer.step = self._step
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        try:
            return trainer.fit()
        except AgreedStop as stop:
            if self._undo_step is not None:
                self._undo_step()
            self._stop(stop.signum, f"rank {stop.rank} was told to stop; ")
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                free_memory(trainer, error)
            if self._undo_step is not None:
                self._undo_step()
            final = error
            if self._processes is not None:
                trainer.is_writer, final = self._processes.settle_failure(error)
            if n_completed_steps(trainer) > n_steps_before:
                message = self._save(is_agreed=False)[1]
                if self._processes is None or trainer.is_writer:
                    logger.error(message)
            if final is not error:
                raise final from error
            raise
        finally:
            self._activity = b"Saving the trained SAE"

    @property
    def signum(self) -> int:
        """The signal that this process has received; 0 for none."""
        return self._signum or 0

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._processes is not None:
            # Ctrl-C sends two: one from the terminal, one from torchrun
            self._signum = signum
            return
        if self._activity is None:
            raise TrainingInterrupted(signum, _NOTHING_TO_SAVE)
        if self._signum is not None:
            raise TrainingInterrupted(signum, "stopped at once by a second signal, nothing saved.")
        self._signum = signum
        # Neither print nor logging: the signal may have arrived while they were writing.
        os.write(2, b"\n" + self._activity + b". Another signal stops at once, unsaved.\n")

    def _begin_step_or_stop(self) -> Any:
        if self._signum is not None and self._processes is None:
            self._stop(self._signum)
        undos = [undo_counters(trainer) for trainer in trainers_of(self._trainer)]
        self._undo_step = lambda: [undo() for undo in undos]
        return self._begin_step()

    def _stop(self, signum: int, told: str = "") -> NoReturn:
        if self._activity is None:
            raise TrainingInterrupted(signum, _NOTHING_TO_SAVE)
        checkpoint, message = self._save(is_agreed=True)
        raise TrainingInterrupted(signum, f"{told}{message}", checkpoint)

    def _save(self, is_agreed: bool) -> tuple[Path | None, str]:
        """Save the run as it is: the checkpoint, if there is one, and what to tell the user.

        If several processes have agreed to save, those that don't write give what they hold.
        """
        if self._processes is None:
            return save_interrupted(self._trainer)
        if not is_agreed and self._trainer.has_sharded_moments:
            return None, "The last step could not be saved: its moments are split over processes."
        if not self._trainer.is_writer:
            if is_agreed:
                save_interrupted(self._trainer)
            checkpoint, message = self._processes.wait_for_saved() or (None, "nothing was saved.")
            return checkpoint and Path(checkpoint), message
        checkpoint, message = save_interrupted(self._trainer)
        self._processes.publish_saved((checkpoint and str(checkpoint), message))
        return checkpoint, message

    def _step(self, batch: torch.Tensor) -> Any:
        self._activity = b"Stopping after this step"
        output = self._compute_step(batch)
        self._undo_step = None
        return output


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the handlers that `InterruptibleFit` replaces, once the block has ended."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def trainers_of(trainer: "MatryoshkaTrainer | LockstepTrainer") -> list[MatryoshkaTrainer]:
    """The trainer of each SAE."""
    is_alone = isinstance(trainer, MatryoshkaTrainer)
    return [trainer] if is_alone else list(trainer.trainers.values())


def n_completed_steps(trainer: "MatryoshkaTrainer | LockstepTrainer") -> int:
    """Steps that have updated the weights; their last act is to advance the learning rate."""
    return trainers_of(trainer)[0].lr_scheduler.last_epoch


def undo_counters(trainer: MatryoshkaTrainer) -> Callable[[], None]:
    """A function that restores the current counters, for a step that fails before its update."""
    counters: dict[str, Any] = {
        "n_training_samples": trainer.n_training_samples,
        "n_frac_active_samples": trainer.n_frac_active_samples,
        "act_freq_scores": trainer.act_freq_scores.clone(),
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired.clone(),
    }
    buffers = {name: buffer.clone() for name, buffer in trainer.sae.named_buffers()}

    def undo() -> None:
        vars(trainer).update(counters)
        trainer.sae.load_state_dict(buffers, strict=False)

    return undo


def free_memory(
    trainer: "MatryoshkaTrainer | LockstepTrainer", error: BaseException | None
) -> None:
    """Free what the failed step allocated, since saving needs memory on the device too."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
    for each in trainers_of(trainer):
        each.optimizer.zero_grad()
    torch.cuda.empty_cache()


def save_interrupted(
    trainer: "MatryoshkaTrainer | LockstepTrainer",
) -> tuple[Path | None, str]:
    """Save a run as it is: the checkpoint, if it could be saved, and what to tell the user."""
    step = n_completed_steps(trainer)
    base = trainer.cfg.checkpoint_path
    if base is None:
        return None, (
            f"none of the {step} steps could be saved, because checkpoint_path is not set. Set it "
            "to a folder to make a stopped run resumable."
        )
    # The checkpoint on disk must not depend on an upload, which may fail or hang.
    for each in (trainer, *trainers_of(trainer)):
        each.cfg = replace(each.cfg, logger=replace(each.cfg.logger, log_to_wandb=False))
    name = str(trainer.n_training_samples)
    checkpoint = (Path(base) / name).resolve()
    try:
        trainer.save_checkpoint(name)
    except Exception as error:
        return None, f"step {step} could not be saved in {checkpoint}: {error}"
    return checkpoint, (
        f"step {step} ({name} training samples) is saved in {checkpoint}. To resume, start the "
        f"same run with --resume_from_checkpoint {checkpoint} (in a config: "
        "resume_from_checkpoint)."
    )


def save_atomically(
    trainer: MatryoshkaTrainer,
    save: Callable[..., None],
    checkpoint_name: str,
    base_path: Path | str | None = None,
    wandb_aliases: list[str] | None = None,
) -> None:
    """`save`, the trainer's `save_checkpoint`, all or nothing and with latents in level order.

    Of several processes, one writes.
    """
    with trainer.whole_moments():
        reorder_latents(trainer)
        if not trainer.is_writer:
            return
        base = base_path if base_path is not None else trainer.cfg.checkpoint_path
        if base is None:
            save(checkpoint_name, base_path, wandb_aliases)
            return
        if (error := not_finite(trainer)) is not None:
            raise error
        n_training_steps = trainer.n_training_steps
        trainer.n_training_steps = n_completed_steps(trainer)  # SAELens counts a step after it
        try:
            with atomic_folder(Path(base) / checkpoint_name) as unfinished:
                save(unfinished.name, base_path, wandb_aliases)
        finally:
            trainer.n_training_steps = n_training_steps


def not_finite(trainer: MatryoshkaTrainer) -> ValueError | None:
    """The error for weights, buffers or moments that are not finite; None if all are."""
    tensors = dict(trainer.sae.state_dict())
    for name, parameter in trainer.sae.named_parameters():
        for moment, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"Adam's {moment} of {name}"] = value
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if not broken:
        return None
    return ValueError(
        f"{', '.join(broken)} not finite after step {n_completed_steps(trainer)}: this "
        "checkpoint is not saved, and earlier ones are kept."
    )
