"""One training step on one process and on several, interleaved, and what the processes send.

    python benchmarks/scaling.py                    # two processes of one thread each
    python benchmarks/scaling.py --processes 4 --d_in 768 --d_sae 24576 --batch_size 768 --k 48

Weak scaling: each process has the batch that one process has alone. Strong scaling: they share it.
In each round every turn is taken once, in an order drawn anew, and one process works alone while
the others wait. Times are those of rank 0, and medians over the rounds. The bytes are the tensors
that a process hands to each kind of collective in a step; a ring sends 2 (R - 1) / R times a
reduced tensor.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import records
import torch
import torch.distributed as dist
from contestants import OURS, InSAELens, Setup
from measuring import spread
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka.kernels.joined_selection import select_joined
from sae_lens_matryoshka.training.widths import paper_widths
from sae_lens_matryoshka.util.markdown import markdown_table

_WARM_UP = 3  # rounds
_COLLECTIVES = {"all_reduce": 0, "all_gather": 1}  # where the tensor stands that is sent


@dataclass
class Options:
    """What is measured, and where."""

    d_in: int = 512  # width of the activations
    d_sae: int = 16384  # width of the dictionary; levels are the paper's five
    batch_size: int = 1024  # activations in the batch of one process
    k: float = 32  # mean number of active latents per activation
    processes: int = 2
    threads: int = 1  # of each process
    device: str = "cpu"  # or cuda
    rounds: int = 15
    out: str | None = None  # write OUT.md and OUT.json


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    options: Options = parser.parse_args().options
    if options.batch_size % options.processes:
        parser.error(f"--batch_size {options.batch_size} is no multiple of --processes")
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(options.processes), *sys.argv]
        env = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        sys.exit(subprocess.run(command, env=env).returncode)
    records.silence_libraries()
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    measured = measure(options)
    if dist.get_rank() == 0:
        report(options, *measured)
    dist.destroy_process_group()


def measure(options: Options) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each turn in each round, and the bytes of each kind of collective in a step."""
    shape = (options.d_in, options.d_sae, paper_widths(options.d_sae))
    whole = Setup(*shape, options.batch_size, options.k, device=options.device)
    share = replace(whole, batch_size=options.batch_size // options.processes)
    alone = InSAELens(OURS, whole)
    weak = InSAELens(OURS, whole, group=dist.group.WORLD)
    strong = InSAELens(OURS, share, group=dist.group.WORLD)
    is_first = dist.get_rank() == 0
    turns: dict[str, Callable[[], object]] = {
        "alone": alone.step if is_first else lambda: None,
        "weak": weak.step,
        "strong": strong.step,
        "selection alone": selection(weak, is_joined=False),
        "selection": selection(weak, is_joined=True),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    order, generator = list(turns), random.Random(0)
    rounds = range(_WARM_UP + options.rounds)
    for _ in tqdm(rounds, desc="Rounds", disable=None if is_first else True):
        generator.shuffle(order)
        for name in order:
            dist.barrier()
            times[name].append(seconds(turns[name], options.device))
    dist.barrier()
    with counted_bytes() as sent:
        weak.step()
    return {name: values[_WARM_UP:] for name, values in times.items()}, dict(sent)


def selection(contestant: InSAELens, is_joined: bool) -> Callable[[], object]:
    """The selection of a step's codes by itself, of this process's batch or of the joined one."""
    sae: Any = contestant.sae
    backend = sae.backend(contestant.batches[0])
    n_keep = int(contestant.setup.k * contestant.setup.batch_size)
    cut = None

    def select(x: torch.Tensor, n: int) -> Any:
        nonlocal cut
        norms = sae.W_dec.data.norm(dim=-1)
        codes = backend.select(x, sae.W_enc.data, sae.b_enc.data, norms, n, cut)
        cut = codes.cut
        return codes

    def run() -> None:
        x = contestant.next_batch()
        if is_joined:
            joined = n_keep * dist.get_world_size()
            most = len(x) * contestant.setup.d_sae
            select_joined(lambda n: select(x, n), joined, most, sae.joined_batch.group)
        else:
            select(x, n_keep)

    return run


def seconds(run: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """The bytes that this process hands to each kind of collective, by size of the tensor."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in _COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def collective(*tensors: torch.Tensor, **options: Any) -> Any:
            tensor = tensors[_COLLECTIVES[name]]
            sent[f"{name} of {tuple(tensor.shape)}"] += tensor.numel() * tensor.element_size()
            return originals[name](*tensors, **options)

        return collective

    for name in _COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def report(options: Options, times: dict[str, list[float]], sent: dict[str, int]) -> None:
    median = {name: float(np.median(values)) for name, values in times.items()}
    n = options.processes
    added = (median["selection"] - median["selection alone"]) / median["weak"]
    rows = [
        [f"one process, batch {options.batch_size:,}", median["alone"], 1.0],
        [
            f"{n}, batch {options.batch_size:,} each",
            median["weak"],
            n * median["alone"] / median["weak"],
        ],
        [
            f"{n}, batch {options.batch_size // n:,} each",
            median["strong"],
            median["alone"] / median["strong"],
        ],
    ]
    table = markdown_table(
        ["processes", "step", "tokens/s, against one process"],
        [[name, records.milliseconds(step), f"{speedup:.2f}"] for name, step, speedup in rows],
    )
    selecting = (
        f"Selecting from the joined batch adds {added:.1%} to a step: "
        f"{records.milliseconds(median['selection'])} instead of "
        f"{records.milliseconds(median['selection alone'])}."
    )
    bytes_table = markdown_table(
        ["collective", "bytes in a step"], [[name, f"{size:,}"] for name, size in sent.items()]
    )
    conditions: dict[str, Any] = {
        "processes": n,
        "threads of each": options.threads,
        "rounds": options.rounds,
    }
    conditions["shape"] = f"{options.d_in} × {options.d_sae:,}, k {options.k:g}"
    record = {
        **records.start("scaling.py", options, options.device, conditions),
        "seconds": {name: spread(values) for name, values in times.items()},
        "bytes": sent,
    }
    print(records.save(options.out, record, table, selecting, bytes_table))


if __name__ == "__main__":
    main()
