"""Training runs that resume after a signal or an exception as if nothing had happened."""

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, constants
from sae_lens.config import HfDataset
from sae_lens.saes.sae import TrainingSAE
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from sae_lens_matryoshka.runs.from_activations import (
    batches_for,
    config_without_model,
    initial_sae,
)
from sae_lens_matryoshka.runs.fused_adam import fused_adam
from sae_lens_matryoshka.runs.interruption import (
    InterruptibleFit,
    Trainer,
    n_completed_steps,
    save_atomically,
)
from sae_lens_matryoshka.training.latent_order import reorder_latents

_RESUME_FILES = (
    constants.SAE_CFG_FILENAME,
    constants.SAE_WEIGHTS_FILENAME,
    constants.TRAINER_STATE_FILENAME,
    constants.ACTIVATION_SCALER_CFG_FILENAME,
    constants.ACTIVATIONS_STORE_STATE_FILENAME,
)
# Estimated before the first step, folded into the weights after the last
_FOLDED_NORMALIZATIONS = ("expected_average_only_in", "covariance_whitening")
# Options that may change when a run resumes
_CHANGEABLE = {
    "device",
    "implementation",
    "selection",
    "metadata",
    "baseline_explained_variance",
}


class MatryoshkaTrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' training runner, for runs that lose no step to a signal or an exception.

    The first SIGINT or SIGTERM lets the current step finish, saves a full checkpoint under
    `checkpoint_path/<n_training_samples>` and raises `TrainingInterrupted`. A second signal, or one
    before the first step, raises it at once. An exception during training also saves the last
    completed step, and propagates. A checkpoint appears under its name once it is complete, and
    only if it is finite. Resuming restores weights, moments, threshold and counters; the activation
    store continues after the texts it has read, so the activations it still held are skipped.
    Adam is fused; see `fused_adam`.

    Args:
        cfg: Config of the run.
        override_dataset: As in SAELens' runner, like `override_model` and `override_sae`.
        activations: Activations to train on instead of a model's, as `ActivationBatches` takes
            them. Fields of `cfg` that concern a model, its hook or its data set are ignored.

    Raises:
        ValueError: `cfg.resume_from_checkpoint` can't be resumed; before the model is loaded. Or
            the activations can't be read or do not fit `cfg`.
    """

    @override
    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        *,
        activations: Any = None,
    ):
        check_resumable(cfg)
        if activations is None:
            super().__init__(cfg, override_dataset, override_model, override_sae)
            return
        if override_dataset is not None or override_model is not None:
            raise ValueError("activations replace a model and its data set: give one or the other.")
        batches: Any = batches_for(cfg, activations)
        self.activations_store = batches
        self.cfg = config_without_model(cfg, batches.metadata)
        self.sae = override_sae if override_sae is not None else initial_sae(self.cfg)
        self.evaluator: Any = None

    @override
    def run(self) -> TrainingSAE[Any]:
        if self.cfg.resume_from_checkpoint is not None:
            # SAELens does this while its prefetching thread draws from the same generator.
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
        # `InterruptibleFit` replaces these until the trained SAE is saved.
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            with fused_adam():
                return super().run()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    @override
    def run_trainer_with_interruption_handling(self, trainer: Trainer) -> TrainingSAE[Any]:
        # Otherwise a resumed trainer saves one more checkpoint for each threshold it has passed.
        trainer.checkpoint_thresholds = [
            n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples
        ]
        # Checkpoints that SAELens' own runner saved during a step do not count it.
        trainer.n_training_steps = n_completed_steps(trainer)
        trainer.save_checkpoint = partial(save_atomically, trainer, trainer.save_checkpoint)
        sae = InterruptibleFit(trainer).run()
        reorder_latents(trainer)  # the SAE that is saved, and the sparsities beside it
        return sae


def check_resumable(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Check that `cfg.resume_from_checkpoint`, if set, is a checkpoint that this run can resume.

    Raises:
        ValueError: the folder or a file in it is missing, broken, of another SAE, or of a run that
            has ended.
    """
    if cfg.resume_from_checkpoint is None:
        return
    folder = Path(cfg.resume_from_checkpoint)
    given = f"resume_from_checkpoint={cfg.resume_from_checkpoint!r}"
    if not folder.is_dir():
        raise ValueError(f"{given} is not a folder; give a checkpoint of an earlier run.")
    missing = [name for name in _RESUME_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{given} is not a complete checkpoint: it lacks {', '.join(missing)}. What SAELens' "
            "own runner saves on an interruption holds no weights and can't be resumed."
        )
    weights = folder / constants.SAE_WEIGHTS_FILENAME
    try:
        with safe_open(weights, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"{given}: {weights.name} is broken ({error}).") from error
    scaler = json.loads((folder / constants.ACTIVATION_SCALER_CFG_FILENAME).read_text())
    is_scaled = scaler["scaling_factor"] is not None or scaler.get("has_whitening", False)
    if cfg.sae.normalize_activations in _FOLDED_NORMALIZATIONS and not is_scaled:
        raise ValueError(
            f"{given} holds a finished SAE: its activation normalization is folded into the "
            "weights. Give a checkpoint saved during training."
        )
    saved = json.loads((folder / constants.SAE_CFG_FILENAME).read_text())
    if saved.get("architecture") == cfg.sae.architecture():  # adds options newer than the file
        saved = json.loads(json.dumps(type(cfg.sae).from_dict(saved).to_dict()))
    wanted = json.loads(json.dumps(cfg.sae.to_dict()))
    unused = set() if wanted.get("prefix_sampling", "fixed") != "fixed" else {"prefix_seed"}
    for name in sorted(wanted.keys() - _CHANGEABLE - unused):
        if saved.get(name) != wanted[name]:
            raise ValueError(
                f"{given} was trained with sae.{name}={saved.get(name)!r}; the config has "
                f"sae.{name}={wanted[name]!r}. Give the same value."
            )
