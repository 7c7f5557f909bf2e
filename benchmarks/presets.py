"""Published training shapes, each in every precision that the device has, against the floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import records
import torch
from ceilings import Floor, bandwidth, floor, matrix_rate
from contestants import (
    ONE_LEVEL,
    OURS,
    PEER,
    SAELENS,
    SAELENS_FLAT,
    Setup,
    has_peer,
    our_implementations,
)
from measuring import KINDS, build, free_memory, memory_for, peak_memory, time_steps
from precisions import Precision, precisions
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.widths import paper_widths

PRESETS: dict[str, dict[str, Any]] = {
    "gemma": {"d_in": 2304, "d_sae": 65536, "batch_size": 2048, "k": 40},  # the paper's
    "gpt2": {"d_in": 768, "d_sae": 24576, "batch_size": 4096, "k": 40},
}
WARM_UP = 5  # rounds that are not counted, in which kernels compile and memory is allocated


@dataclass(frozen=True)
class Job:
    """Where and how long to measure, and where to write it."""

    device: str
    n_dead: int
    shrink: int  # sizes are divided by it
    rounds: int
    threads: int
    command: str
    out: str | None

    def described(self) -> dict[str, Any]:
        options = {k: v for k, v in asdict(self).items() if k not in ("command", "out")}
        return {**options, **records.machine(self.device)}


def preset_setup(preset: str, job: Job) -> Setup:
    sizes = {k: v if k == "k" else v // job.shrink for k, v in PRESETS[preset].items()}
    widths = paper_widths(sizes["d_sae"])
    return Setup(**sizes, widths=widths, n_dead=job.n_dead, device=job.device)


def run(preset: str, job: Job) -> None:
    """Measure one precision after the other, and write what there is after each."""
    setup = preset_setup(preset, job)
    record: dict[str, Any] = {
        "command": job.command,
        "conditions": {**shape(setup), **job.described()},
        "precisions": {},
    }
    bytes_per_second = bandwidth(job.device)
    for precision in precisions(setup.device):
        section = _measure(setup, precision, job.rounds, bytes_per_second)
        free_memory()
        record["precisions"][precision.name] = section
        print(section_text(precision.name, section), flush=True)
        records.save(job.out, report(record), record)


def shape(setup: Setup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in ("d_in", "d_sae", "widths", "batch_size", "k")}


def _measure(
    setup: Setup, precision: Precision, rounds: int, bytes_per_second: float
) -> dict[str, Any]:
    flops_per_second = matrix_rate(precision, setup.device)
    least = floor(setup.d_in, setup.d_sae, setup.batch_size, flops_per_second, bytes_per_second)
    setup = replace(setup, autocast=precision.autocast)
    with precision.applied():
        contestants = build(_names(setup.device, precision), setup)
        results = time_steps(contestants, setup, rounds, WARM_UP, precision.name)
        for name, contestant in tqdm(contestants.items(), desc="Memory", disable=None):
            row = results[name]
            row["over_floor"] = {"step": row["step"]["median"] / least.seconds}
            if torch.device(setup.device).type == "cuda":
                with memory_for(name):
                    row["memory_bytes"] = {kind: peak_memory(contestant, kind) for kind in KINDS}
    return {"floor": asdict(least), "results": results}


def _names(device: str, precision: Precision) -> list[str]:
    implementations = our_implementations(device)
    return [
        *(f"{OURS}, {implementation}" for implementation in implementations),
        f"{OURS}, {implementations[0]}{ONE_LEVEL}",
        SAELENS,
        SAELENS_FLAT,
        # Its trainer has no autocast.
        *([PEER] if has_peer() and not precision.autocast else []),
    ]


def section_text(title: str, section: dict[str, Any]) -> str:
    """One precision as Markdown."""
    least = Floor(**section["floor"])
    explained = (
        f"Floor: {records.milliseconds(least.seconds)}, of which "
        f"{records.milliseconds(least.encode_seconds)} are the encode product's "
        f"{least.flops / 1e9:.3g} GFLOP at {least.flops_per_second / 1e12:.3g} TFLOP/s, and "
        f"{records.milliseconds(least.optimizer_seconds)} Adam's {least.optimizer_bytes / 1e9:.3g} "
        f"GB at {least.bytes_per_second / 1e9:.4g} GB/s; both rates measured in this run."
    )
    results = section["results"]
    paragraphs = [records.step_table(results, SAELENS), records.monitor_line(results), explained]
    return "\n\n".join([f"**{title}**", *filter(None, paragraphs)])


def report(record: dict[str, Any]) -> str:
    """The command, a table for each precision, and the conditions, as Markdown."""
    explained = (
        f"×: {SAELENS} divided by the row, in the same precision. Memory is beyond parameters, "
        "gradients and moments."
    )
    sections = (section_text(title, section) for title, section in record["precisions"].items())
    return records.text(record, explained, warning(record), *sections)


def warning(record: dict[str, Any]) -> str:
    """What to say of a trial on small shapes."""
    shrink = record["conditions"]["shrink"]
    if shrink == 1:
        return ""
    return (
        f"**A trial of the command**: d_in, d_sae and batch are divided by {shrink}, k is not. "
        "These times say nothing about the real shapes."
    )
