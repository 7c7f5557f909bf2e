"""What a benchmark writes: tables, figures, and the machine that they come from."""

from __future__ import annotations

import importlib.util
import json
import logging
import platform
import subprocess
import warnings
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import sae_lens
import torch

from sae_lens_matryoshka.training.monitoring import OBSERVED_EVERY
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table


def command(script: str, *options: Any) -> str:
    """The command line that repeats a run, from its option dataclasses."""
    flags = [
        f"--{f.name}" if value is True else f"--{f.name} {value}"
        for option in options
        for f in fields(option)
        if (value := getattr(option, f.name)) != f.default and f.name != "out"
    ]
    return " ".join([f"python benchmarks/{script}", *flags])


def silence_libraries() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)


def text(record: dict[str, Any], *paragraphs: str) -> str:
    """The command, then `paragraphs`, then the conditions, as Markdown."""
    conditions = ", ".join(f"{name} {value}" for name, value in record["conditions"].items())
    return "\n\n".join([f"`{record['command']}`", *filter(None, paragraphs), conditions]) + "\n"


def save(out: str | None, text: str, record: dict[str, Any]) -> None:
    """Write OUT.md and OUT.json, if there is an OUT, each whole or not at all."""
    if out is None:
        return
    for ending, content in ((".md", text), (".json", json.dumps(record, indent=2) + "\n")):
        path = Path(out + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as unfinished:
            unfinished.write_text(content)


# Title, and where the figure is in a row of results.
_COLUMNS = (
    ("forward-backward", "forward_backward", "median"),
    ("full step", "step", "median"),
    ("full step / floor", "over_floor", "step"),
    ("memory of forward-backward", "memory_bytes", "forward_backward"),
    ("memory of a full step", "memory_bytes", "step"),
)


def step_table(results: dict[str, dict[str, dict[str, float]]], base: str) -> str:
    """Times and memory of steps as Markdown, a row per contestant, with ratios `base` / row.

    Args:
        results: As from `measuring.time_steps`, with `memory_bytes` and `over_floor` if measured.
        base: The contestant that the others are compared with.
    """
    titles, rows = [""], [[name] for name in results]
    for title, key, part in _COLUMNS:
        figures = {
            name: row[key][part] for name, row in results.items() if part in row.get(key, {})
        }
        if not figures:
            continue
        titles += [title] if key == "over_floor" else [title, "×"]
        for cells in rows:
            cells += _cells(key, figures.get(cells[0]), figures.get(base))
    return markdown_table(titles, rows)


def _cells(key: str, figure: float | None, base: float | None) -> list[str]:
    """A figure and its ratio."""
    if key == "over_floor":
        return ["" if figure is None else f"{figure:.2f}"]
    if figure is None:
        return ["", ""]
    is_memory = key == "memory_bytes"
    if is_memory and figure < 2**20:  # the process holds as much anyway
        return ["< 1 MiB", ""]
    shown = f"{figure / 2**20:.0f} MiB" if is_memory else milliseconds(figure)
    ratio = "" if base is None or (is_memory and base < 2**20) else f"{base / figure:.2f}×"
    return [shown, ratio]


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def monitor_line(results: dict[str, dict[str, Any]]) -> str:
    """What the monitor of training costs, where it was measured."""
    return "\n".join(
        f"Monitor: {100 * row['monitor']['share']:.2f} % of a full step of {name}, on average; it "
        f"observes every {OBSERVED_EVERY}th step, which takes "
        f"{milliseconds(row['monitor']['observed_step'])} instead."
        for name, row in results.items()
        if "monitor" in row
    )


def machine(device: str) -> dict[str, Any]:
    """The hardware and the libraries."""
    facts = {
        "processor": torch.cuda.get_device_name()
        if device != "cpu"
        else _cpu_name() or platform.machine(),
        "torch": torch.__version__,
        "sae_lens": sae_lens.__version__,
        "python": platform.python_version(),
    }
    if device == "cpu":
        return facts
    return {
        **facts,
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": importlib.util.find_spec("triton") and metadata.version("triton"),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), None)
