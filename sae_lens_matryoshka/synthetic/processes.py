"""Passes of training in processes of their own, with one progress bar over all of them."""

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
from sae_lens_matryoshka.synthetic.training import train_pass
from sae_lens_matryoshka.synthetic.variants import Variant

_VARIANTS_PER_PASS = 8  # a pass that ends early loses what it has trained
_SECONDS_BETWEEN_LOOKS = 0.5

_n_steps_done: Any = None  # shared by the processes


def train_all(
    benchmark: Benchmark,
    lacking: Mapping[int, Sequence[Variant]],
    out: Path,
    *,
    n_jobs: int,
    device: str = "cpu",
) -> None:
    """Train what is lacking, seeds beside each other.

    Args:
        benchmark: Model and training settings.
        lacking: Seed → variants, as `runs.missing` returns them.
        out: Output folder.
        n_jobs: How many processes, of one thread each.
        device: Where to compute.

    Raises:
        ValueError: an SAE diverged.
        OSError: a process was killed, or the disk refused.
    """
    passes = [
        (variants[start : start + _VARIANTS_PER_PASS], seed)
        for seed, variants in lacking.items()
        for start in range(0, len(variants), _VARIANTS_PER_PASS)
    ]
    if not passes:
        return
    context = multiprocessing.get_context("spawn")
    n_steps_done = context.Value("q", 0)
    n_steps = benchmark.n_samples // benchmark.batch_size * sum(len(v) for v, _ in passes)
    executor = ProcessPoolExecutor(
        min(n_jobs, len(passes)), context, initializer=_start, initargs=(n_steps_done,)
    )
    try:
        with tqdm(total=n_steps, desc="Training", unit="step", smoothing=0) as bar:
            pending = {
                executor.submit(_train, benchmark, variants, seed, out, device)
                for variants, seed in passes
            }
            while pending:
                done, pending = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                bar.update(n_steps_done.value - bar.n)
                for future in done:
                    future.result()
        executor.shutdown()
    except BrokenProcessPool as error:
        raise OSError(
            f"a training process was killed, by the lack of memory perhaps; {out} has what is "
            "finished, and the same command goes on."
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
    train_pass(benchmark, variants, seed, out, device, on_step=_count)


def _count(n_steps: int) -> None:
    with _n_steps_done.get_lock():
        _n_steps_done.value += n_steps
