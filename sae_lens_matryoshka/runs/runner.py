"""Training runs that can be stopped, or break off, and be gone on with as if they had not."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import HfDataset
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from sae_lens_matryoshka.runs.interruption import InterruptibleFit, n_whole_steps, save_whole
from sae_lens_matryoshka.training.latent_order import reorder_latents

if TYPE_CHECKING:  # transformer-lens 2 and 3 keep it in different modules
    from transformer_lens.HookedRootModule import HookedRootModule

_RESUME_FILES = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
)
# These two are estimated before the first step and folded into the weights after the last.
_FOLDED_NORMALIZATIONS = ("expected_average_only_in", "covariance_whitening")
# What a run may go on with in another way: where and how it computes, and what it is called.
_CHANGEABLE = {"device", "implementation", "metadata", "baseline_explained_variance"}


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
        # Both SAELens and `InterruptibleFit` replace these; the trained SAE is saved after `fit`.
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            return super().run()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

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
        trainer.n_training_steps = n_whole_steps(trainer)
        save = partial(save_whole, trainer, trainer.save_checkpoint)

        def save_in_level_order(*args: Any, **kwargs: Any) -> None:
            reorder_latents(trainer)
            save(*args, **kwargs)

        trainer.save_checkpoint = save_in_level_order
        sae = InterruptibleFit(trainer).run()
        reorder_latents(trainer)  # what is saved of it, and the sparsities beside it
        return sae


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
            weights.keys()
    except SafetensorError as error:
        raise ValueError(f"{given}: {SAE_WEIGHTS_FILENAME} is broken ({error}).") from error
    scaler = json.loads((folder / ACTIVATION_SCALER_CFG_FILENAME).read_text())
    is_scaled = scaler["scaling_factor"] is not None or scaler.get("has_whitening", False)
    if cfg.sae.normalize_activations in _FOLDED_NORMALIZATIONS and not is_scaled:
        raise ValueError(
            f"{given} holds a finished SAE: its activation normalization is folded into the "
            "weights. Accepted: a checkpoint saved during training."
        )
    saved = json.loads((folder / SAE_CFG_FILENAME).read_text())
    if saved.get("architecture") == cfg.sae.architecture():  # options it is older than
        saved = json.loads(json.dumps(type(cfg.sae).from_dict(saved).to_dict()))
    wanted = json.loads(json.dumps(cfg.sae.to_dict()))
    unused = set() if wanted.get("prefix_sampling", "fixed") != "fixed" else {"prefix_seed"}
    for name in sorted(wanted.keys() - _CHANGEABLE - unused):
        if saved.get(name) != wanted[name]:
            raise ValueError(
                f"{given} was trained with sae.{name}={saved.get(name)!r}; the config has "
                f"sae.{name}={wanted[name]!r}. Accepted: the same value."
            )
