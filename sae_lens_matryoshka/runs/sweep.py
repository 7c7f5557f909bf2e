"""A sweep: several SAEs from one pass over the activations, stopped and resumed as one run."""

import copy
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import wandb
from jaxtyping import Float
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_matryoshka.runs.from_activations import initial_sae
from sae_lens_matryoshka.runs.interruption import InterruptibleFit, handlers_restored
from sae_lens_matryoshka.runs.lockstep import LockstepTrainer, failures_in
from sae_lens_matryoshka.runs.runner import check_resumable
from sae_lens_matryoshka.training.latent_order import reorder_latents
from sae_lens_matryoshka.util.files import atomic_folder

# What the SAEs of a sweep do not share
_OWN_FIELDS = ("sae", "seed", "output_path", "checkpoint_path", "resume_from_checkpoint")

_Configs = Mapping[str, LanguageModelSAERunnerConfig[Any]]


class TrainedSweep(NamedTuple):
    """What a sweep ends with.

    Attributes:
        saes: The trained SAEs by name.
        failures: Why the other SAEs are missing.
        held_out: Activations that followed those of training, as many as asked for or a few more.
    """

    saes: dict[str, TrainingSAE[Any]]
    failures: dict[str, str]
    held_out: Float[torch.Tensor, "rows d_in"]


class SweepRunner:
    """Trains SAEs on the activations of one run, and saves each as the run of it alone would.

    Each ends with the weights that it would have alone, from the same initial weights and batches.
    Its initial weights are the first that torch draws from its own `seed`. Signals and exceptions
    do to all what they do to the one SAE of `MatryoshkaTrainingRunner`; an SAE that fails alone is
    left out (see `LockstepTrainer`). W&B sees one run, with each SAE's metrics under its name.

    Args:
        runner: The run that they share: its config, model, evaluator and activations. Its SAE is
            not trained.
        cfgs: The config of each SAE alone, by name, as in `Sweep`.

    Raises:
        ValueError: a checkpoint that the SAEs are to resume from can't be resumed, or torchrun has
            started several processes.
    """

    def __init__(self, runner: LanguageModelSAETrainingRunner, cfgs: _Configs):
        self._failures = check_sweep(cfgs)
        self._shared = runner
        self._cfgs = {name: cfg for name, cfg in cfgs.items() if name not in self._failures}
        self._runners = {name: _runner_of(runner, cfg) for name, cfg in self._cfgs.items()}
        runner.sae = next(iter(self._runners.values())).sae  # frees the one that is not trained

    def run(self, n_held_out: int = 0) -> TrainedSweep:
        """Train the SAEs and save them below `output_path`.

        Args:
            n_held_out: How many activations to draw after training, to measure the SAEs on.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM stopped the training.
            Exception: every SAE failed, or the activations can't be drawn.
        """
        with handlers_restored():
            return self._run(n_held_out)

    def _run(self, n_held_out: int) -> TrainedSweep:
        cfg, store = self._shared.cfg, self._shared.activations_store
        checkpoint = _checkpoint_of(self._cfgs)
        if checkpoint is not None:
            store.load_from_checkpoint(checkpoint / next(iter(self._cfgs)))
        if cfg.logger.log_to_wandb:
            wandb.init(
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                config={
                    **cfg.to_dict(),
                    "saes": {name: each.sae.to_dict() for name, each in self._cfgs.items()},
                },
                name=cfg.logger.run_name,
                id=cfg.logger.wandb_id,
            )
        batches: Any = iter(store)
        if cfg.prefetch_llm_batches:
            batches = PrefetchingIterator(batches, prefetch=int(cfg.prefetch_llm_batches))
        try:
            trainer = LockstepTrainer(
                cfg.to_sae_trainer_config(),
                self._runners,
                batches,
                evaluator=None if self._shared.evaluator is None else self._evaluate,
            )
            if checkpoint is not None:
                trainer.load_checkpoint(checkpoint)
            InterruptibleFit(trainer).run()
            for name in trainer.saes:
                self._save(name, trainer)
            n_batches = -(-n_held_out // cfg.train_batch_size_tokens)
            held_out = list(islice(batches, n_batches))
        finally:
            if isinstance(batches, PrefetchingIterator):
                batches.close()
        if cfg.logger.log_to_wandb:
            wandb.finish()
        nothing = torch.empty(0, cfg.sae.d_in)
        return TrainedSweep(trainer.saes, trainer.failures, torch.cat(held_out or [nothing]))

    def _save(self, name: str, trainer: LockstepTrainer) -> None:
        reorder_latents(trainer.trainers[name])
        with atomic_folder(Path(str(self._cfgs[name].output_path))) as unfinished:
            self._runners[name].save_final_sae(
                sae=trainer.saes[name],
                output_path=str(unfinished),
                log_feature_sparsity=trainer.trainers[name].log_feature_sparsity,
            )

    def _evaluate(
        self,
        saes: dict[str, TrainingSAE[Any]],
        data_provider: Any,
        activation_scalers: dict[str, Any],
        hook_names: dict[str, str],
    ) -> dict[str, Any]:
        """The metrics of the run's evaluator for each SAE, under its name."""
        evaluator = self._shared.evaluator
        return {
            f"{name}/{metric}": value
            for name, sae in saes.items()
            for metric, value in evaluator(sae, data_provider, activation_scalers[name]).items()
        }


def check_sweep(cfgs: _Configs) -> dict[str, str]:
    """Check that this process is alone, and that the SAEs can resume if they have checkpoints.

    Returns:
        The SAEs that failed before the checkpoint was saved, and why.

    Raises:
        ValueError: torchrun started several processes, or an SAE can't resume (`check_resumable`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--vary trains on one process: start it without torchrun, or give each process some of "
            "the values."
        )
    checkpoint = _checkpoint_of(cfgs)
    failures = {} if checkpoint is None else failures_in(checkpoint)
    for name, cfg in cfgs.items():
        if name not in failures:
            check_resumable(cfg)
    return failures


def _checkpoint_of(cfgs: _Configs) -> Path | None:
    folder = next(iter(cfgs.values())).resume_from_checkpoint
    return None if folder is None else Path(folder).parent


def _runner_of(
    shared: LanguageModelSAETrainingRunner, cfg: LanguageModelSAERunnerConfig[Any]
) -> LanguageModelSAETrainingRunner:
    """The runner of one SAE alone, with the model and the activations of `shared`."""
    runner = copy.copy(shared)
    runner.cfg = copy.copy(shared.cfg)  # with the model's name, if the activations record it
    for name in _OWN_FIELDS:
        setattr(runner.cfg, name, getattr(cfg, name))
    device = torch.device(cfg.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        runner.sae = initial_sae(cfg)
    runner._set_sae_metadata()
    runner._compile_sae_if_needed()
    return runner
