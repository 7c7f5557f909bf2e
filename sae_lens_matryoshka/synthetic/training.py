"""Training in lockstep: the SAEs of one seed share their samples, which are slow to draw."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.results import (
    SCORES_FILE,
    library_versions,
    result_folder,
    settings_of,
)
from sae_lens_matryoshka.synthetic.scores import score
from sae_lens_matryoshka.synthetic.variants import Variant
from sae_lens_matryoshka.training.options import NestedOptions
from sae_lens_matryoshka.util.files import atomic_folder

_L0_SHARE = 10  # `l0_training` is the mean over the last tenth of the steps


def train_together(
    benchmark: Benchmark,
    variants: Sequence[Variant],
    seed: int,
    out: Path,
    device: str = "cpu",
    on_step: Callable[[int], object] = lambda n_steps: None,
) -> None:
    """Train variants on one stream of samples, score them as saved, and save the results.

    A result depends on the benchmark, the variant and the seed alone, not on which variants are
    trained beside it.

    Args:
        benchmark: Model and training settings.
        variants: What to train, under distinct names.
        seed: Of the model (where it takes one), the samples and the SAEs.
        out: Output folder, as for `result_folder`.
        device: Where to draw samples and train.
        on_step: Called with the number of training steps since its last call.

    Raises:
        ValueError: an SAE diverged.
    """
    model = benchmark.build(seed, device)
    streams = {v.name: RandomStream(seed, Purpose.SAE, device) for v in variants}
    trainers: dict[str, SAETrainer[TrainingSAE[Any], Any]] = {}
    for variant in variants:
        with streams[variant.name].active():
            trainers[variant.name] = _trainer(benchmark, variant, seed, device)
    seconds = dict.fromkeys(trainers, 0.0)
    samples = RandomStream(seed, Purpose.SAMPLES, device)
    for _ in range(benchmark.n_samples // benchmark.batch_size):
        with samples.active():
            x = model.sample(benchmark.batch_size)
        for name, trainer in trainers.items():
            start = time.perf_counter()
            # Training may draw random numbers, which must not affect the next SAE.
            with streams[name].active():
                _step(trainer, x, name)
            seconds[name] += time.perf_counter() - start
        on_step(len(trainers))
    with ExitStack() as unfinished:
        folders = [
            unfinished.enter_context(atomic_folder(result_folder(out, variant.name, seed)))
            for variant in variants
        ]
        saved = [
            _save_and_load(trainer, folder, device)
            for trainer, folder in zip(trainers.values(), folders, strict=True)
        ]
        with RandomStream(seed, Purpose.SCORING, device).active():
            all_scores = score(saved, model, benchmark.n_scoring_samples)
        for variant, folder, scores in zip(variants, folders, all_scores, strict=True):
            l0_training = trainers[variant.name].sae.cfg.metadata.l0
            record = {
                "settings": settings_of(benchmark, variant, seed),
                "scores": {**scores, "l0_training": l0_training},
                "seconds": round(seconds[variant.name], 2),
                "device": device,
                "versions": library_versions(),
            }
            text = json.dumps(record, indent=2, allow_nan=False)
            (folder / SCORES_FILE).write_text(text + "\n")


def _save_and_load(trainer: SAETrainer[Any, Any], folder: Path, device: str) -> SAE[Any]:
    """Save the trained SAE for inference, and load it again."""
    trainer.set_final_sae_metadata()
    trainer.sae.eval()
    trainer.sae.save_inference_model(str(folder))
    return SAE.load_from_disk(folder, device=device)


def _step(trainer: SAETrainer[Any, Any], x: torch.Tensor, name: str) -> None:
    """One step, as in SAELens' `MultiSAETrainer`."""
    trainer.maybe_reset_sparsity()
    try:
        trainer.step(x)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    trainer.n_training_steps += 1


def _trainer(
    benchmark: Benchmark, variant: Variant, seed: int, device: str
) -> SAETrainer[Any, Any]:
    cfg = copy.deepcopy(variant.cfg)  # training writes to its metadata
    if isinstance(cfg, NestedOptions):
        cfg.prefix_seed = seed
    cfg.device = device
    sae_class = SAE_TRAINING_CLASS_REGISTRY[cfg.architecture()][0]
    n_steps = benchmark.n_samples // benchmark.batch_size
    trainer_cfg = SAETrainerConfig(
        total_training_samples=n_steps * benchmark.batch_size,
        train_batch_size_samples=benchmark.batch_size,
        lr=benchmark.lr,
        lr_end=benchmark.lr,
        device=device,
        # The first window ends here, and a second one runs to the end.
        feature_sampling_window=n_steps - n_steps // _L0_SHARE,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(trainer_cfg, sae_class(cfg).to(device), iter(()))
