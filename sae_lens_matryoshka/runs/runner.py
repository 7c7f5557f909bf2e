"""Training runs that resume after a signal or an exception as if nothing had happened."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    constants,
    logger,
)
from sae_lens.config import HfDataset
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from typing_extensions import override

from sae_lens_matryoshka.runs.config import flat, warn_of_slow_products
from sae_lens_matryoshka.runs.from_activations import (
    batches_for,
    config_without_model,
    initial_sae,
)
from sae_lens_matryoshka.runs.interruption import (
    InterruptibleFit,
    handlers_restored,
    n_completed_steps,
    save_atomically,
)
from sae_lens_matryoshka.runs.processes import DEFAULT_TIMEOUT, Processes, local_rank
from sae_lens_matryoshka.runs.text_share import load_position, save_positions, take_share
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from sae_lens_matryoshka.training.base import NestedTrainingSAE
from sae_lens_matryoshka.training.latent_order import reorder_latents
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.files import check_writable

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
    Adam is fused, and clips within its update.

    Started by torchrun, several processes train one SAE, the same as one process would: each reads
    its share of the texts and computes its share of every batch of `cfg.train_batch_size_tokens`.
    A run may resume on another number of processes. docs/scaling.md says more.

    Args:
        cfg: Config of the run.
        override_dataset: As in SAELens' runner, like `override_model` and `override_sae`.
        activations: Activations to train on instead of a model's, as `ActivationBatches` takes
            them. Fields of `cfg` that concern a model, its hook or its data set are ignored.
        process_timeout: Seconds that one of several processes waits for the others.
        shard_moments: Whether each of several processes keeps only its part of Adam's moments; then
            a run that fails can't save the step before, because they are gone.

    Raises:
        ValueError: `cfg.resume_from_checkpoint` can't be resumed, or the run can't be split over
            the processes; before the model is loaded. Or the activations can't be read or do not
            fit `cfg`.
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
        process_timeout: float = DEFAULT_TIMEOUT,
        shard_moments: bool = False,
    ):
        check_resumable(cfg, from_activations=activations is not None)
        for name in ("output_path", "checkpoint_path"):
            if getattr(cfg, name) is not None:
                check_writable(name, Path(getattr(cfg, name)))
        if activations is not None and not (override_dataset is None and override_model is None):
            raise ValueError("activations replace a model and its data set: give one or the other.")
        warn_of_slow_products(cfg, from_activations=activations is not None)
        self._shard_moments, self._reads_texts = shard_moments, activations is None
        self.processes = processes = Processes.start(cfg.device, process_timeout)
        with ExitStack() as on_error:
            if processes is not None:
                on_error.callback(processes.close)
                on_error.enter_context(processes.naming_failures())
                _prepare_for(processes, cfg)
            self._reads_files_of_its_own = False
            if activations is None:
                super().__init__(cfg, override_dataset, override_model, override_sae)
                if processes is not None:
                    self._reads_files_of_its_own = take_share(
                        self.activations_store, processes, cfg.train_batch_size_tokens
                    )
            else:
                rank, n = (0, 1) if processes is None else (processes.rank, processes.n)
                batches: Any = batches_for(cfg, activations, rank, n)
                if processes is not None:  # a cache may still be growing
                    processes.check_equal({"the number of activations": batches.n_rows})
                self.activations_store = batches
                self.cfg = config_without_model(cfg, batches.metadata)
                self.sae = override_sae if override_sae is not None else initial_sae(self.cfg)
                self.evaluator: Any = None
            on_error.pop_all()

    @override
    def run(self) -> TrainingSAE[Any]:
        with ExitStack() as at_exit:
            at_exit.enter_context(handlers_restored())
            if self.processes is not None:
                at_exit.callback(self.processes.close)
            processes = self.processes
            with nullcontext() if processes is None else processes.naming_failures():
                trainer = self._start(at_exit)
            sae = self.run_trainer_with_interruption_handling(trainer)
            if self.cfg.output_path is not None and trainer.is_writer:
                self.save_final_sae(
                    sae=sae,
                    output_path=self.cfg.output_path,
                    log_feature_sparsity=trainer.log_feature_sparsity,
                )
            if self.cfg.logger.log_to_wandb:
                wandb.finish()
            return sae

    def _start(self, at_exit: ExitStack) -> MatryoshkaTrainer:
        """The trainer, at the step from which it is to train."""
        cfg, processes = self.cfg, self.processes
        self._set_sae_metadata()
        is_first = processes is None or processes.rank == 0
        if cfg.logger.log_to_wandb:
            wandb.init(
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                config=cfg.to_dict(),
                name=cfg.logger.run_name,
                id=cfg.logger.wandb_id,
                mode=None if is_first else "disabled",
            )
        if cfg.resume_from_checkpoint is not None:
            self._load_position(Path(cfg.resume_from_checkpoint))
        batches: Iterator[torch.Tensor] = self.activations_store
        if cfg.prefetch_llm_batches:
            batches = PrefetchingIterator(batches, prefetch=int(cfg.prefetch_llm_batches))
            at_exit.callback(batches.close)
        trainer = MatryoshkaTrainer(
            sae=self.sae,
            data_provider=batches,
            evaluator=self.evaluator if is_first else None,
            save_checkpoint_fn=self.save_checkpoint,
            cfg=cfg.to_sae_trainer_config(),
            group=None if processes is None else processes.group,
            shard_moments=self._shard_moments,
        )
        if cfg.resume_from_checkpoint is not None:
            trainer.load_trainer_state(cfg.resume_from_checkpoint)
            self.sae.load_weights_from_checkpoint(cfg.resume_from_checkpoint)
            logger.info(f"Resuming {cfg.resume_from_checkpoint}, step {n_completed_steps(trainer)}")
        self._compile_sae_if_needed()
        return trainer

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> TrainingSAE[Any]:
        # Otherwise a resumed trainer saves one more checkpoint for each threshold it has passed.
        trainer.checkpoint_thresholds = [
            n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples
        ]
        # Checkpoints that SAELens' own runner saved during a step do not count it.
        trainer.n_training_steps = n_completed_steps(trainer)
        trainer.save_checkpoint = partial(save_atomically, trainer, trainer.save_checkpoint)
        fit = InterruptibleFit(trainer, self.processes)
        if self.processes is not None:
            own, evaluator = trainer.data_provider, trainer.evaluator
            if evaluator is not None:  # which pauses a prefetching thread
                trainer.evaluator = lambda sae, _, scaler: evaluator(sae, own, scaler)
            trainer.data_provider = self.processes.together(
                own,
                signum=lambda: fit.signum,
                n_texts=lambda: getattr(self.activations_store, "n_dataset_processed", 0),
            )
        sae = fit.run()
        reorder_latents(trainer)  # the SAE that is saved, and the sparsities beside it
        if isinstance(sae, NestedTrainingSAE):
            sae.join_statistics()
        return sae

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is None or self.processes is None:
            return
        if self._reads_texts:
            save_positions(checkpoint_path, self.processes, self._reads_files_of_its_own)

    def _load_position(self, checkpoint: Path) -> None:
        if self._reads_texts:
            load_position(self.activations_store, checkpoint, self.processes)
        else:
            self.activations_store.load_from_checkpoint(checkpoint)


def _prepare_for(processes: Processes, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Check that these processes can split the run, and let them write to the same folders."""
    processes.check_equal(flat(cfg.to_dict(), "the config"))
    if cfg.use_cached_activations:
        raise invalid_option(
            "use_cached_activations",
            True,
            "false with several processes, and the folder as activations",
        )
    for name in ("device", "llm_device", "act_store_device"):
        device = getattr(cfg, name)
        if torch.device(device).type == "cuda":
            if torch.device(device).index is not None:
                raise invalid_option(
                    name, device, "'cuda' with several processes, one GPU for each"
                )
            # TransformerLens takes "cuda" for the first GPU, torch for the current one
            setattr(cfg, name, f"cuda:{local_rank()}")
    batch_size = cfg.train_batch_size_tokens
    if batch_size % processes.n:
        raise invalid_option(
            "train_batch_size_tokens",
            batch_size,
            f"a multiple of {processes.n}: each process has its share of the batch",
        )
    cfg.checkpoint_path = processes.from_rank_0(cfg.checkpoint_path)


def check_resumable(
    cfg: LanguageModelSAERunnerConfig[Any], from_activations: bool | None = None
) -> None:
    """Check that `cfg.resume_from_checkpoint`, if set, is a checkpoint that this run can resume.

    Args:
        cfg: Config of the run.
        from_activations: Whether the run is given activations; None if that is not known.

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
    position = load_file(folder / constants.ACTIVATIONS_STORE_STATE_FILENAME)
    if from_activations is False and "row" in position:
        raise ValueError(f"{given} was trained on activations that it was given: give them again.")
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
