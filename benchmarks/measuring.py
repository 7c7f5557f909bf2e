"""Time and memory of what the contestants do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from contestants import Contestant, Setup
from tqdm.auto import tqdm

Turn = tuple[str, str]  # a contestant's name, and what of it runs: forward_backward or step
KINDS = ("forward_backward", "step")


class DoesNotFit(Exception):
    """A contestant needs more memory than there is."""

    def __init__(self, name: str):
        super().__init__(f"{name} does not fit into memory beside the other contestants")
        self.name = name


@contextmanager
def memory_for(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise DoesNotFit(name) from None


def build(names: Sequence[str], setup: Setup) -> dict[str, Contestant]:
    contestants = {}
    for name in names:
        with memory_for(name):
            contestants[name] = Contestant(name, setup)
    return contestants


def turns_of(
    contestants: Mapping[str, Contestant], kinds: Sequence[str] = KINDS
) -> dict[Turn, Callable[[], object]]:
    return {
        (name, kind): getattr(contestant, kind)
        for kind in kinds
        for name, contestant in contestants.items()
    }


def measure_times(
    turns: Mapping[Turn, Callable[[], object]],
    rounds: int,
    warm_up: int,
    device: str,
    title: str = "Rounds",
) -> dict[Turn, list[float]]:
    """Seconds of each turn in each round after the warm-up; in a round every turn comes once."""
    times: dict[Turn, list[float]] = {turn: [] for turn in turns}
    for _ in tqdm(range(warm_up + rounds), desc=title, disable=None, leave=None):
        for turn, run in turns.items():
            with memory_for(turn[0]):
                times[turn].append(seconds(run, device))
    return {turn: values[warm_up:] for turn, values in times.items()}


def seconds(run: Callable[[], object], device: str) -> float:
    """How long `run` takes: on a GPU by its own clock, from an idle GPU to the last kernel."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def peak_memory(contestant: Contestant, kind: str) -> int:
    """Bytes on the GPU at the peak of a turn, beyond parameters, their gradients and moments.

    Between turns there are no gradients, so those are taken off what a turn adds.
    """
    gradients = sum(p.numel() * p.element_size() for p in contestant.parameters if p.requires_grad)
    added = []
    for _ in contestant.batches:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        getattr(contestant, kind)()
        torch.cuda.synchronize()
        added.append(torch.cuda.max_memory_allocated() - before)
    return max(added) - gradients


def free_memory() -> None:
    """Give back what contestants held that are gone."""
    if torch.cuda.is_available():  # a process gets its own memory back without being asked
        gc.collect()
        torch.cuda.empty_cache()
