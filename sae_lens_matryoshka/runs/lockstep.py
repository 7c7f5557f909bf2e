"""Several SAEs trained on the same batches, each as SAELens' trainer trains it alone."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import LanguageModelSAETrainingRunner, logger
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAEEvaluatorProtocol, MultiSAETrainer
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_matryoshka.runs.interruption import (
    free_memory,
    n_completed_steps,
    not_finite,
    save_atomically,
    save_interrupted,
    undo_counters,
)
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from sae_lens_matryoshka.util.files import atomic_folder

FAILURES_FILENAME = "failures.json"


class LockstepTrainer(MultiSAETrainer):
    """SAELens' trainer of several SAEs, where one that fails does not end the others.

    Every SAE takes the same steps on the same batches, with metrics under its name. A checkpoint
    has a folder for each SAE, which a run of that SAE alone can resume too. An SAE whose step
    raises, or whose weights or moments are not finite, is left out from then on: `failures` says
    why, and its last completed step is saved under the `checkpoint_path` of its own config. A step
    in which every SAE fails raises the error of the first.

    Args:
        cfg: What the SAEs share.
        runners: The runner of each SAE, by name.
        data_provider: Batches of shape (B, d_in).
        evaluator: Called as SAELens calls that of several SAEs.
    """

    trainers: dict[str, Any]  # of MatryoshkaTrainer, which the base class's annotation excludes
    is_writer = True  # as in MatryoshkaTrainer: the only process
    data_provider: Any  # MultiSAETrainer's yields a batch for each hook

    @override
    def __init__(
        self,
        cfg: SAETrainerConfig,
        runners: Mapping[str, LanguageModelSAETrainingRunner],
        data_provider: Iterator[Float[torch.Tensor, "batch d_in"]],
        evaluator: MultiSAEEvaluatorProtocol | None = None,
    ):
        super().__init__(
            cfg=cfg,
            saes={name: runner.sae for name, runner in runners.items()},
            hook_names={name: runner.cfg.hook_name for name, runner in runners.items()},
            data_provider=data_provider,  # type: ignore[arg-type]
            evaluator=evaluator,
            save_checkpoint_fn=self._save_failures,
        )
        self.trainers = {name: _trainer_of(runner) for name, runner in runners.items()}
        self.failures: dict[str, str] = {}
        self._undo_step: dict[str, Callable[[], None]] = {}

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        super().load_checkpoint(path)
        self.failures = failures_in(path)
        self.checkpoint_thresholds = [
            n for n in self.checkpoint_thresholds if n >= self.n_training_samples
        ]

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        self._estimate_scaling_factors()
        total = self.cfg.total_training_samples
        with tqdm(
            total=total,
            initial=self.n_training_samples,
            desc=f"Training {len(self.saes)} SAEs",
            unit=" tokens",
            unit_scale=True,
        ) as bar:
            while self.n_training_samples < total:
                self.maybe_reset_sparsity()
                outputs = self.step(next(self.data_provider))
                if self.cfg.logger.log_to_wandb:
                    self._log_train_step(outputs)
                    self._run_and_log_evals()
                self._checkpoint_if_needed()
                for trainer in self.trainers.values():
                    trainer.n_training_steps += 1
                self.n_training_steps += 1
                bar.update(self.n_training_samples - bar.n)
        self._leave_out_what_is_not_finite()
        self._maybe_log_sparsity(final=True)
        for trainer in self.trainers.values():
            _fold_normalization(trainer)
            trainer.set_final_sae_metadata()
        if self.cfg.save_final_checkpoint:
            self.save_checkpoint(f"final_{self.n_training_samples}")
        return self.saes

    def maybe_reset_sparsity(self) -> None:
        """Begin a step, as `SAETrainer.maybe_reset_sparsity` does."""
        self._undo_step = {name: undo_counters(trainer) for name, trainer in self.trainers.items()}
        self._maybe_log_sparsity()

    def step(self, batch: Float[torch.Tensor, "batch d_in"]) -> dict[str, TrainStepOutput]:
        """One step of every SAE.

        Returns:
            The outputs of those that did not fail, by name, if they are to be logged.

        Raises:
            Exception: every SAE failed.
        """
        outputs: dict[str, TrainStepOutput] = {}
        errors: dict[str, Exception] = {}
        for name, trainer in self.trainers.items():
            result = _output_or_error(trainer, batch)
            if isinstance(result, Exception):
                errors[name] = result
            elif self._is_logging_step():  # otherwise their memory is free for the next SAE
                outputs[name] = result
        if len(errors) == len(self.trainers):
            raise next(iter(errors.values()))
        for name, error in errors.items():
            self._undo_step[name]()
            self._leave_out(name, error)
        self.n_training_samples = next(iter(self.trainers.values())).n_training_samples
        return outputs

    @override
    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """As `MultiSAETrainer.save_checkpoint`, all or nothing."""
        self._leave_out_what_is_not_finite()
        base = self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, wandb_aliases)
            return
        with atomic_folder(Path(base) / checkpoint_name) as unfinished:
            super().save_checkpoint(unfinished.name, wandb_aliases)

    def _save_failures(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            (checkpoint_path / FAILURES_FILENAME).write_text(json.dumps(self.failures))

    def _leave_out_what_is_not_finite(self) -> None:
        for name, trainer in list(self.trainers.items()):
            if (error := not_finite(trainer)) is not None:
                if len(self.trainers) == 1:
                    raise error
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        trainer = self.trainers.pop(name)
        del self.saes[name]
        self.failures[name] = f"after step {n_completed_steps(trainer)}: {error}"
        _, saved = save_interrupted(trainer)
        logger.error(
            f"The sweep continues without {name}, which failed {self.failures[name]}\n"
            f"Of {name} alone, {saved}"
        )

    @override
    @torch.no_grad()
    def _estimate_scaling_factors(self) -> None:
        """Estimate each statistic once for all SAEs, batch by batch; SAELens keeps all batches."""
        for normalization, estimate in (
            ("expected_average_only_in", ActivationScaler.estimate_scaling_factor),
            ("covariance_whitening", ActivationScaler.estimate_whitening),
        ):
            waiting = [
                trainer
                for trainer in self.trainers.values()
                if trainer.sae.cfg.normalize_activations == normalization
                and not _is_estimated(trainer.activation_scaler)
            ]
            if waiting:
                scaler = ActivationScaler()
                d_in, n_batches = waiting[0].sae.cfg.d_in, self.cfg.n_batches_for_norm_estimate
                estimate(scaler, d_in, self.data_provider, n_batches)
                for trainer in waiting:
                    trainer.activation_scaler = copy.copy(scaler)


def failures_in(checkpoint: Path | str) -> dict[str, str]:
    """The SAEs that had failed when a sweep's checkpoint was saved, and why."""
    path = Path(checkpoint) / FAILURES_FILENAME
    return json.loads(path.read_text()) if path.is_file() else {}


def _trainer_of(runner: LanguageModelSAETrainingRunner) -> MatryoshkaTrainer:
    cfg = runner.cfg.to_sae_trainer_config()
    trainer = MatryoshkaTrainer(
        cfg=replace(cfg, n_checkpoints=0, save_final_checkpoint=False),
        sae=runner.sae,
        data_provider=iter(()),
        save_checkpoint_fn=runner.save_checkpoint,
    )
    trainer.save_checkpoint = partial(save_atomically, trainer, trainer.save_checkpoint)
    return trainer


def _output_or_error(
    trainer: MatryoshkaTrainer, batch: Float[torch.Tensor, "batch d_in"]
) -> TrainStepOutput | Exception:
    try:
        return trainer.step(batch)
    except Exception as error:
        free_memory(trainer, error)
        return error


def _is_estimated(scaler: ActivationScaler) -> bool:
    return scaler.scaling_factor is not None or scaler.whitening is not None


def _fold_normalization(trainer: MatryoshkaTrainer) -> None:
    """Let the SAE take activations as they are."""
    scaler, trainer.activation_scaler = trainer.activation_scaler, ActivationScaler()
    if scaler.scaling_factor is not None:
        trainer.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if (whitening := scaler.whitening) is not None:
        trainer.sae.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )
