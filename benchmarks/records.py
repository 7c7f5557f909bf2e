"""What a run writes: its table, its figures, and the machine that they come from."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import sae_lens
import torch

from sae_lens_matryoshka.util.files import atomic_file


def save(out: str | None, text: str, record: dict[str, Any]) -> None:
    """Write OUT.md and OUT.json, if there is an OUT, each whole or not at all."""
    if out is None:
        return
    for ending, content in ((".md", text), (".json", json.dumps(record, indent=2) + "\n")):
        path = Path(out + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as unfinished:
            unfinished.write_text(content)


def machine(device: str) -> dict[str, Any]:
    return {
        "processor": torch.cuda.get_device_name()
        if device != "cpu"
        else _cpu_name() or platform.machine(),
        "torch": torch.__version__,
        "sae_lens": sae_lens.__version__,
        "python": platform.python_version(),
    }


def gpu(device: str) -> dict[str, Any]:
    """What matters on a GPU besides."""
    if device == "cpu":
        return {}
    return {
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
