"""Training in parallel processes, with one progress bar over all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.synthetic.training import train_together
from sae_lens_matryoshka.synthetic.variants import Variant

_VARIANTS_PER_TASK = 8  # a task that is interrupted loses what it has trained
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
    """Train variants over several seeds in parallel.

    Args:
        benchmark: Model and training settings.
        untrained: Seed → variants, as from `results.untrained_variants`.
        out: Output folder.
        n_jobs: Number of processes, each with one thread.
        device: Where to compute.

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
    executor = ProcessPoolExecutor(
        min(n_jobs, len(tasks)), context, initializer=_start, initargs=(n_steps_done,)
    )
    try:
        with tqdm(total=n_steps, desc="Training", unit="step", smoothing=0) as bar:
            pending = {
                executor.submit(_train, benchmark, variants, seed, out, device)
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


def _train(
    benchmark: Benchmark, variants: Sequence[Variant], seed: int, out: Path, device: str
) -> None:
    train_together(benchmark, variants, seed, out, device, on_step=_count)


def _count(n_steps: int) -> None:
    with _n_steps_done.get_lock():
        _n_steps_done.value += n_steps
