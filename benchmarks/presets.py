"""Published training shapes, each in every precision that the device has, against the floor."""

from dataclasses import replace
from typing import Any

import records
import torch
from ceilings import Precision, bandwidth, floor, matrix_rate, precisions
from contestants import (
    ONE_LEVEL,
    OURS,
    PEER,
    SAELENS,
    SAELENS_FLAT,
    SAELENS_FUSED,
    Setup,
    has_peer,
    our_implementations,
)
from measuring import KINDS, build, free_memory, memory_for, peak_memory, time_steps
from options import Options
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.widths import paper_widths

PRESETS: dict[str, dict[str, Any]] = {
    "gemma": {"d_in": 2304, "d_sae": 65536, "batch_size": 2048, "k": 40},  # the paper's
    "gemma_4096": {"d_in": 2304, "d_sae": 65536, "batch_size": 4096, "k": 40},
    "gpt2": {"d_in": 768, "d_sae": 24576, "batch_size": 4096, "k": 40},
}


def run(preset: str, options: Options) -> None:
    """Measure one precision after the other, and write what there is after each."""
    sizes = {k: v if k == "k" else v // options.shrink for k, v in PRESETS[preset].items()}
    setup = Setup(
        **sizes,
        widths=paper_widths(sizes["d_sae"]),
        n_dead=options.n_dead,
        skewed=options.skewed,
        device=options.device,
    )
    record = {**options.record(**shape(setup)), "precisions": {}}
    bytes_per_second = bandwidth(options.device)
    for precision in precisions(setup.device):
        section = _measure(setup, precision, options.n_rounds, bytes_per_second)
        free_memory()
        record["precisions"][precision.name] = section
        print(section_text(precision.name, section), flush=True)
        explained = (
            f"×: {SAELENS} divided by the row, in the same precision. Memory is beyond parameters, "
            "gradients and moments."
        )
        sections = (section_text(name, each) for name, each in record["precisions"].items())
        records.save(options.out, record, explained, warning(options), *sections)


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
        results = time_steps(contestants, setup, rounds, precision.name)
        for name, contestant in tqdm(contestants.items(), desc="Memory", disable=None):
            row = results[name]
            least_seconds = least["encode_seconds"] + least["optimizer_seconds"]
            row["over_floor"] = {"step": row["step"]["median"] / least_seconds}
            if torch.device(setup.device).type == "cuda":
                with memory_for(name):
                    row["memory_bytes"] = {kind: peak_memory(contestant, kind) for kind in KINDS}
    return {"floor": least, "results": results}


def _names(device: str, precision: Precision) -> list[str]:
    ours = [f"{OURS}, {implementation}" for implementation in our_implementations(device)]
    # the peer's trainer has no autocast
    peers = [PEER] if has_peer() and not precision.autocast else []
    return [*ours, f"{ours[0]}{ONE_LEVEL}", SAELENS, SAELENS_FUSED, SAELENS_FLAT, *peers]


def section_text(title: str, section: dict[str, Any]) -> str:
    """One precision as Markdown."""
    least, results = section["floor"], section["results"]
    encode, optimizer = least["encode_seconds"], least["optimizer_seconds"]
    explained = (
        f"Floor: {records.milliseconds(encode + optimizer)}, of which "
        f"{records.milliseconds(encode)} are the encode product's {least['flops'] / 1e9:.3g} GFLOP "
        f"at {least['flops_per_second'] / 1e12:.3g} TFLOP/s, and {records.milliseconds(optimizer)} "
        f"Adam's {least['optimizer_bytes'] / 1e9:.3g} GB at {least['bytes_per_second'] / 1e9:.4g} "
        "GB/s; both rates measured in this run."
    )
    paragraphs = [records.step_table(results, SAELENS), records.monitor_line(results), explained]
    return "\n\n".join([f"**{title}**", *paragraphs])


def warning(options: Options) -> str:
    """What to say of a trial on small shapes."""
    if options.shrink == 1:
        return ""
    return (
        f"**A trial of the command**: d_in, d_sae and batch are divided by {options.shrink}, k is "
        "not. These times say nothing about the real shapes."
    )
