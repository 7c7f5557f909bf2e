"""Published training shapes, each in every precision that the device has, against the floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import records
import torch
from ceilings import Floor, bandwidth, floor, matrix_rate
from contestants import (
    ENCODE,
    ONE_LEVEL,
    OURS,
    PEER,
    SAELENS,
    SAELENS_FLAT,
    Setup,
    encode_product,
    has_peer,
    our_implementations,
)
from measuring import (
    KINDS,
    build,
    free_memory,
    measure_times,
    memory_for,
    peak_memory,
    spread,
    turns_of,
)
from precisions import Precision, precisions
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.widths import paper_widths

PRESETS: dict[str, dict[str, Any]] = {
    "gemma": {"d_in": 2304, "d_sae": 65536, "batch_size": 2048, "k": 40},  # the paper's
    "gpt2": {"d_in": 768, "d_sae": 24576, "batch_size": 4096, "k": 40},
}
WARM_UP = 5  # rounds that are not counted: kernels are compiled and memory is set aside
FLOOR = "floor: encode product + Adam"


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
        return {
            "n_dead": self.n_dead,
            "device": self.device,
            "rounds": self.rounds,
            "shrink": self.shrink,
            "threads": self.threads,
            **records.machine(self.device),
            **records.gpu(self.device),
        }


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
        print(table(precision.name, section), flush=True)
        records.save(job.out, report(record), record)


def shape(setup: Setup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in ("d_in", "d_sae", "widths", "batch_size", "k")}


def _measure(
    setup: Setup, precision: Precision, rounds: int, bytes_per_second: float
) -> dict[str, Any]:
    least = floor(
        setup.d_in,
        setup.d_sae,
        setup.batch_size,
        matrix_rate(precision, setup.device),
        bytes_per_second,
    )
    setup = replace(setup, autocast=precision.autocast)
    with precision.applied():
        contestants = build(_names(setup.device, precision), setup)
        turns = turns_of(contestants)
        with memory_for(ENCODE):
            turns[ENCODE, "forward_backward"] = encode_product(setup)
        times = measure_times(turns, rounds, WARM_UP, setup.device, precision.name)
        results: dict[str, dict[str, Any]] = {}
        for (name, kind), values in times.items():
            results.setdefault(name, {})[kind] = spread(values)
        for name, contestant in tqdm(contestants.items(), desc="Memory", disable=None):
            row = results[name]
            row["step_over_floor"] = row["step"]["median"] / least.seconds
            if torch.device(setup.device).type == "cuda":
                with memory_for(name):
                    row["memory_bytes"] = {kind: peak_memory(contestant, kind) for kind in KINDS}
    return {"floor": {**asdict(least), "seconds": least.seconds}, "results": results}


def _names(device: str, precision: Precision) -> list[str]:
    implementations = our_implementations(device)
    return [
        *(f"{OURS}, {implementation}" for implementation in implementations),
        f"{OURS}, {implementations[0]}{ONE_LEVEL}",
        SAELENS,
        SAELENS_FLAT,
        # Its trainer knows no autocast.
        *([PEER] if has_peer() and not precision.autocast else []),
    ]


def table(title: str, section: dict[str, Any]) -> str:
    """One precision as Markdown. Ratios with × are SAELens / this row, of time or memory."""
    results, base = section["results"], section["results"][SAELENS]
    has_memory = "memory_bytes" in base
    header = ["", "forward-backward", "", "full step", "", "full step / floor"]
    if has_memory:
        beyond = "memory beyond parameters, gradients and moments"
        header += [f"forward-backward: {beyond}", "", f"full step: {beyond}", ""]
    lines = [_row(header), "|---|" + "---:|" * (len(header) - 1)]
    for name, row in results.items():
        cells = [name]
        for kind in KINDS:
            cells += _compared(row, base, kind)
        cells.append(f"{row['step_over_floor']:.2f}" if "step_over_floor" in row else "")
        if has_memory:
            for kind in KINDS:
                cells += _compared_memory(row, base, kind)
        lines.append(_row(cells))
    seconds = section["floor"]["seconds"]
    ratio = f"{base['step']['median'] / seconds:.1f}×"
    cells = [FLOOR, "", "", milliseconds(seconds), ratio, "1.00"]
    lines.append(_row([*cells, *[""] * (len(header) - len(cells))]))
    return "\n".join(["", f"**{title}**", "", *lines, "", _explained(section["floor"]), ""])


def _compared(row: dict[str, Any], base: dict[str, Any], kind: str) -> list[str]:
    if kind not in row:
        return ["", ""]
    median = row[kind]["median"]
    return [milliseconds(median), f"{base[kind]['median'] / median:.1f}×"]


def _compared_memory(row: dict[str, Any], base: dict[str, Any], kind: str) -> list[str]:
    if "memory_bytes" not in row:
        return ["", ""]
    n_bytes, of_base = row["memory_bytes"][kind], base["memory_bytes"][kind]
    return [f"{n_bytes / 2**20:.0f} MiB", f"{of_base / n_bytes:.1f}×" if n_bytes > 0 else ""]


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def _explained(figures: dict[str, Any]) -> str:
    least = Floor(**{k: v for k, v in figures.items() if k != "seconds"})
    return (
        f"Floor: {least.flops / 1e9:.3g} GFLOP of the encode product at "
        f"{least.flops_per_second / 1e12:.3g} TFLOP/s, {milliseconds(least.encode_seconds)}, and "
        f"Adam's {least.optimizer_bytes / 1e9:.3g} GB at {least.bytes_per_second / 1e9:.4g} GB/s, "
        f"{milliseconds(least.optimizer_seconds)}; both rates measured in this run."
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def report(record: dict[str, Any]) -> str:
    """The command, a table for each precision, and the conditions, as Markdown."""
    tables = [table(title, section) for title, section in record["precisions"].items()]
    conditions = ", ".join(f"{k} {v}" for k, v in record["conditions"].items())
    base = f"×: {SAELENS} divided by the row, in the same precision."
    return "\n".join(
        [f"`{record['command']}`", "", base, *warning(record), *tables, conditions, ""]
    )


def warning(record: dict[str, Any]) -> list[str]:
    """What to say of a trial on small shapes."""
    shrink = record["conditions"]["shrink"]
    if shrink == 1:
        return []
    return [
        "",
        f"**A trial of the command**: d_in, d_sae and batch are divided by {shrink}, k is not. "
        "These times say nothing about the real shapes.",
    ]
