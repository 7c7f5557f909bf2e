"""Time and memory of what the contestants do."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from contestants import (
    ENCODE,
    OURS,
    Contestant,
    Setup,
    encode_product,
    make_contestant,
)
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.monitoring import OBSERVED_EVERY

Turn = tuple[str, str]  # a contestant's name, and its method that runs
KINDS = ("forward_backward", "step")
WARM_UP = {"cpu": 2, "cuda": 5}  # uncounted rounds; kernels compile, and memory is allocated
_MONITOR_PAIRS = 5  # steps with and without the monitor, per round


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
            contestants[name] = make_contestant(name, setup)
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
    turns: Mapping[Turn, Callable[[], object]], rounds: int, device: str, title: str = "Rounds"
) -> dict[Turn, list[float]]:
    """Seconds of each turn in each round after the warm-up; every round has every turn once.

    Their order is drawn anew, since what a turn leaves in caches and allocator slows the next.
    """
    warm_up = WARM_UP["cpu" if device == "cpu" else "cuda"]
    times: dict[Turn, list[float]] = {turn: [] for turn in turns}
    order, generator = list(turns), random.Random(0)
    for _ in tqdm(range(warm_up + rounds), desc=title, disable=None, leave=None):
        generator.shuffle(order)
        for turn in order:
            with memory_for(turn[0]):
                times[turn].append(seconds(turns[turn], device))
    return {turn: values[warm_up:] for turn, values in times.items()}


def time_steps(
    contestants: Mapping[str, Contestant],
    setup: Setup,
    rounds: int,
    title: str = "Rounds",
    alone: Mapping[Turn, Callable[[], object]] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of forward-backward and full step of each contestant, of the encode product, and of
    what else runs `alone`.

    The first of our SAEs also has `monitor`; see `monitor_cost`.
    """
    turns = {**turns_of(contestants), **(alone or {})}
    with memory_for(ENCODE):
        turns[ENCODE, "forward_backward"] = encode_product(setup)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for (name, kind), values in measure_times(turns, rounds, setup.device, title).items():
        results.setdefault(name, {})[kind] = spread(values)
    ours = next(name for name in contestants if name.startswith(OURS))
    results[ours]["monitor"] = monitor_cost(ours, contestants[ours], rounds)
    return results


def monitor_cost(name: str, contestant: Contestant, rounds: int) -> dict[str, float]:
    """What the monitor of training adds to a step, from pairs of steps with and without it.

    Returns:
        observed_step: Seconds of a step that the monitor observes.
        share: What it adds to the average step, as a share of one that it does not observe.
    """
    # the two steps after one that is observed never are
    turns = turns_of({name: contestant}, ["monitored_step", "step"])
    times = measure_times(turns, _MONITOR_PAIRS * rounds, contestant.setup.device, "Monitor")
    observed, step = (np.array(values) for values in times.values())
    share = np.median(observed - step) / OBSERVED_EVERY / np.median(step)
    return {"observed_step": float(np.median(observed)), "share": float(share)}


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of `run`: on a GPU by its own clock, from an idle GPU to the last kernel's end."""
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
    return max(gpu_peak(getattr(contestant, kind)) for _ in contestant.batches) - gradients


def gpu_peak(run: Callable[[], object]) -> int:
    """Bytes on the GPU that `run` adds at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory() -> None:
    """Return the memory of deleted contestants to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
