"""What a benchmark writes: tables, figures, and the machine that they come from."""

import importlib.util
import json
import logging
import os
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

_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # of PyTorch; `sae-matryoshka` sets it


def start(script: str, options: Any, device: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """A record with the command line that repeats a run, from its options, and its conditions."""
    flags = [
        f"--{f.name}" if value is True else f"--{f.name} {value}"
        for f in fields(options)
        if (value := getattr(options, f.name)) != f.default and f.name != "out"
    ]
    huge_pages = [f"{_HUGE_PAGES}=1"] if os.environ.get(_HUGE_PAGES) == "1" else []
    return {
        "command": " ".join([*huge_pages, f"python benchmarks/{script}", *flags]),
        "conditions": {**conditions, **_machine(device)},
    }


def silence_libraries() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)


def save(out: str | None, record: dict[str, Any], *paragraphs: str) -> str:
    """Write OUT.md and OUT.json, if there is an OUT, each whole or not at all.

    Returns:
        The Markdown: the command, the paragraphs and the conditions.
    """
    conditions = ", ".join(f"{name} {value}" for name, value in record["conditions"].items())
    shown = [f"`{record['command']}`", *filter(None, paragraphs), conditions]
    text = "\n\n".join(shown) + "\n"
    for ending, content in ((".md", text), (".json", json.dumps(record, indent=2) + "\n")):
        if out is not None:
            path = Path(out + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as unfinished:
                unfinished.write_text(content)
    return text


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def _mebibytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else "< 1 MiB"


# Title, how a figure is shown, and where it is in a row of results.
_COLUMNS = (
    ("forward-backward", milliseconds, "forward_backward", "median"),
    ("full step", milliseconds, "step", "median"),
    ("full step / floor", "{:.2f}".format, "over_floor", "step"),
    ("memory of forward-backward", _mebibytes, "memory_bytes", "forward_backward"),
    ("memory of a full step", _mebibytes, "memory_bytes", "step"),
)


def step_table(results: dict[str, dict[str, dict[str, float]]], base: str) -> str:
    """Times and memory of steps as Markdown, a row per contestant, with ratios `base` / row.

    Args:
        results: As from `measuring.time_steps`, with `memory_bytes` and `over_floor` if measured.
        base: The contestant that the others are compared with.
    """
    titles, rows = [""], {name: [name] for name in results}
    for title, show, key, part in _COLUMNS:
        figures = {n: row[key][part] for n, row in results.items() if part in row.get(key, {})}
        if not figures:
            continue
        titles += [title] if key == "over_floor" else [title, "×"]
        for name, cells in rows.items():
            figure, reference = figures.get(name), figures.get(base)
            cells.append("" if figure is None else show(figure))
            if key == "over_floor":
                continue
            # less memory than that may be what the process holds anyway
            least = 2**20 if key == "memory_bytes" else 0
            if figure and reference and min(figure, reference) >= least:
                cells.append(f"{reference / figure:.2f}×")
            else:
                cells.append("")
    return markdown_table(titles, rows.values())


def monitor_line(results: dict[str, dict[str, Any]]) -> str:
    """What the monitor of training costs, where it was measured."""
    return "\n".join(
        f"Monitor: {100 * row['monitor']['share']:.2f} % of a full step of {name}, on average; it "
        f"observes every {OBSERVED_EVERY}th step, which takes "
        f"{milliseconds(row['monitor']['observed_step'])} instead."
        for name, row in results.items()
        if "monitor" in row
    )


def _machine(device: str) -> dict[str, Any]:
    """The hardware and the libraries."""
    libraries = {
        "torch": torch.__version__,
        "sae_lens": sae_lens.__version__,
        "python": platform.python_version(),
    }
    if device == "cpu":
        return {"processor": _cpu_name() or platform.machine(), **libraries}
    return {
        "processor": torch.cuda.get_device_name(),
        **libraries,
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
