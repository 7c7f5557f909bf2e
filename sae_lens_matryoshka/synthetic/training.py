"""Training in lockstep, in parallel processes.

The SAEs of one seed share their samples, which are slow to draw; seeds are independent tasks.
"""

import copy
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.sae_trainer import SAETrainer
from tqdm.auto import tqdm

from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.results import result_folder, settings_of, write_scores
from sae_lens_matryoshka.synthetic.scores import score
from sae_lens_matryoshka.synthetic.variants import Variant
from sae_lens_matryoshka.training.options import NestedOptions
from sae_lens_matryoshka.util.files import atomic_folder

_L0_SHARE = 10  # `l0_training` is the mean over the last tenth of the steps
_VARIANTS_PER_TASK = 8  # an interrupted task loses what it has trained
_POLL_SECONDS = 0.5

_n_steps_done: Any = None  # a counter that all processes share


def train_all(
    benchmark: Benchmark,
    untrained: Mapping[int, Sequence[Variant]],
    out: Path,
    *,
    n_jobs: int,
    device: str = "cpu",
) -> None:
    """Train variants, given by seed, in `n_jobs` processes of one thread; see `train_together`.

    Raises:
        ValueError: an SAE diverged.
        OSError: a process was killed, or a file could not be written.
    """
    tasks = [
        (variants[start : start + _VARIANTS_PER_TASK], seed)
        for seed, variants in untrained.items()
        for start in range(0, len(variants), _VARIANTS_PER_TASK)
    ]
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    n_steps_done = context.Value("q", 0)
    n_steps = benchmark.n_samples // benchmark.batch_size * sum(len(v) for v, _ in tasks)
    n_workers = min(n_jobs, len(tasks))
    executor = ProcessPoolExecutor(n_workers, context, _start, initargs=(n_steps_done,))
    try:
        with tqdm(total=n_steps, desc="Training", unit="step", smoothing=0) as bar:
            pending = {
                executor.submit(train_together, benchmark, variants, seed, out, device, _count)
                for variants, seed in tasks
            }
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
                bar.update(n_steps_done.value - bar.n)
                for future in done:
                    future.result()
        executor.shutdown()
    except BrokenProcessPool as error:
        raise OSError(
            f"a training process was killed, perhaps for lack of memory; {out} has the finished "
            "SAEs, and the same command trains the rest."
        ) from error
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _start(n_steps_done: Any) -> None:
    global _n_steps_done
    _n_steps_done = n_steps_done
    torch.set_num_threads(1)


def _count(n_steps: int) -> None:
    with _n_steps_done.get_lock():
        _n_steps_done.value += n_steps


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
        seed: Seed of the model (where it takes one), the samples and the SAEs.
        out: Output folder, as for `result_folder`.
        device: Where to draw samples and train.
        on_step: Called with the number of training steps since its last call.

    Raises:
        ValueError: an SAE diverged.
    """
    model = benchmark.build(seed, device)
    samples = RandomStream(seed, Purpose.SAMPLES, device)
    saes = [_SAEInTraining(benchmark, variant, seed, device) for variant in variants]
    for _ in range(benchmark.n_samples // benchmark.batch_size):
        with samples.active():
            x = model.sample(benchmark.batch_size)
        for sae in saes:
            sae.step(x)
        on_step(len(saes))
    with ExitStack() as unfinished:
        folders = [
            unfinished.enter_context(atomic_folder(result_folder(out, variant.name, seed)))
            for variant in variants
        ]
        saved = [sae.save_and_load(folder) for sae, folder in zip(saes, folders, strict=True)]
        with RandomStream(seed, Purpose.SCORING, device).active():
            all_scores = score(saved, model, benchmark.n_scoring_samples)
        for sae, folder, scores in zip(saes, folders, all_scores, strict=True):
            write_scores(
                folder,
                settings=settings_of(benchmark, sae.variant, seed),
                scores={**scores, "l0_training": sae.trainer.sae.cfg.metadata.l0},
                seconds=round(sae.seconds, 2),
                device=device,
            )


class _SAEInTraining:
    """One variant in SAELens' trainer, with a random stream of its own."""

    def __init__(self, benchmark: Benchmark, variant: Variant, seed: int, device: str):
        self.variant = variant
        self.seconds = 0.0  # of its steps
        self._device = device
        # Training may draw random numbers, which must not affect the other SAEs.
        self._stream = RandomStream(seed, Purpose.SAE, device)
        cfg = copy.deepcopy(variant.cfg)  # training writes to its metadata
        cfg.device = device
        if isinstance(cfg, NestedOptions):
            cfg.prefix_seed = seed
        n_steps = benchmark.n_samples // benchmark.batch_size
        trainer_cfg = SAETrainerConfig(
            total_training_samples=n_steps * benchmark.batch_size,
            train_batch_size_samples=benchmark.batch_size,
            lr=benchmark.lr,
            lr_end=benchmark.lr,
            device=device,
            # the first window ends here, and a second one runs to the end
            feature_sampling_window=n_steps - n_steps // _L0_SHARE,
            logger=LoggingConfig(log_to_wandb=False),
        )
        sae_class = SAE_TRAINING_CLASS_REGISTRY[cfg.architecture()][0]
        with self._stream.active():
            self.trainer = SAETrainer(trainer_cfg, sae_class(cfg).to(device), iter(()))

    def step(self, x: Float[torch.Tensor, "batch d_in"]) -> None:
        """One step, as in SAELens' `MultiSAETrainer`."""
        start = time.perf_counter()
        with self._stream.active():
            self.trainer.maybe_reset_sparsity()
            try:
                self.trainer.step(x)
            except ValueError as error:
                raise ValueError(f"{self.variant.name}: {error}") from error
            self.trainer.n_training_steps += 1
        self.seconds += time.perf_counter() - start

    def save_and_load(self, folder: Path) -> SAE[Any]:
        """Save the trained SAE for inference, and load it again."""
        self.trainer.set_final_sae_metadata()
        self.trainer.sae.eval()
        self.trainer.sae.save_inference_model(str(folder))
        return SAE.load_from_disk(folder, device=self._device)
