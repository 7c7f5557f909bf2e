"""Time and memory of one training step: this package against its peers, interleaved in one process.

    python benchmarks/step_time.py                       # the shape of docs/benchmarks/step_time.md
    python benchmarks/step_time.py --d_in 768 --d_sae 24576 --k 40 --threads 2 --n_dead 500
    python benchmarks/step_time.py --variants            # the objective's options, against default
    python benchmarks/step_time.py --device cuda --preset gemma    # or gpt2, or sweep

A step is SAELens' own: forward, statistics, backward, gradient clipping and Adam, as
`SAETrainer.step` runs it. Forward-backward is the SAE's part of it alone. Peers that are not
installed are left out. Times are medians over rounds in which every contestant takes one turn;
ratios within a run hold where absolute times drift. Memory is what a step adds at its peak to
parameters and moments, in a process that runs this contestant alone.

A preset is a published shape in every precision of the device, against the floor that its measured
matrix rate and bandwidth leave (presets.py, ceilings.py); `sweep` lets one size grow at a time
(growth.py). On a GPU presets report the memory at the peak beyond parameters, gradients and
moments; on a CPU none. `--shrink` runs presets on a small machine.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import growth
import presets
import records
import torch
from contestants import (
    ENCODE,
    OURS,
    OURS_FLAT,
    PEER,
    REFERENCE,
    SAELENS,
    SAELENS_FLAT,
    VARIANTS,
    Contestant,
    Setup,
    encode_product,
    has_peer,
)
from measuring import DoesNotFit, build, measure_times, turns_of
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.widths import paper_widths

ROUNDS, PRESET_ROUNDS = 9, 20
LARGEST_SHRINK = 64  # leaves the smallest dictionary of a preset more latents than k


@dataclass
class Options:
    """What is measured, and where."""

    d_in: int = 512  # width of the activations
    d_sae: int = 16384  # width of the dictionary; levels are the paper's five
    batch_size: int = 1024  # activations in a batch
    k: float = 32  # mean number of active latents per activation
    n_dead: int = 0  # latents that count as dead in every step
    threads: int = 1  # CPU threads
    device: str = "cpu"  # or cuda
    dtype: str = "float32"
    autocast: bool = False  # bfloat16 autocast, as SAELens' trainer does it
    variants: bool = False  # this package's options instead of the peers
    rounds: int | None = None  # turns of each contestant after the warm-up; 9, with --preset 20
    out: str | None = None  # write OUT.md and OUT.json: the table, its command and conditions
    memory_of: str | None = None  # measure the memory of this contestant alone, and print it


@dataclass
class Preset:
    """Shapes and precisions that are set; of the options above only those that say where and how
    long: n_dead, threads, device, rounds and out."""

    preset: str | None = None  # gemma, gpt2, or sweep (which also writes OUT.png)
    shrink: int = 1  # divide d_in, d_sae and batch by this, to try a preset on a small machine


def setup_of(options: Options) -> Setup:
    return Setup(
        d_in=options.d_in,
        d_sae=options.d_sae,
        widths=paper_widths(options.d_sae),
        batch_size=options.batch_size,
        k=options.k,
        n_dead=options.n_dead,
        device=options.device,
        dtype=options.dtype,
        autocast=options.autocast,
    )


def median_times(options: Options, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each contestant's forward-backward and step."""
    setup = setup_of(options)
    turns = {**turns_of(build(names, setup)), (ENCODE, "forward_backward"): encode_product(setup)}
    medians: dict[str, dict[str, float]] = {}
    for (name, kind), values in measure_times(turns, rounds, 2, options.device).items():
        medians.setdefault(name, {})[kind] = statistics.median(values)
    return medians


def measure_memory(options: Options, name: str) -> float:
    """MiB that a step of `name` adds at its peak, in this process."""
    contestant = Contestant(name, setup_of(options))
    for _ in range(3):
        contestant.step()
    if options.device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    for _ in range(3):
        contestant.step()
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str = "VmRSS") -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def _memory_in_own_process(options: Options, name: str) -> float:
    arguments = [
        f"--{field}={value}"
        for field, value in asdict(replace(options, out=None, memory_of=name)).items()
        if value is not None
    ]
    result = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown, every ratio against SAELens, or against the default options."""
    base = results.get(SAELENS, results[OURS])
    lines = [
        "| | forward-backward | | full step | | memory of a step | |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        cells = []
        for kind, unit, scale in (
            ("forward_backward", "ms", 1e3),
            ("step", "ms", 1e3),
            ("memory_mib", "MiB", 1),
        ):
            if kind not in row:
                cells += ["", ""]
                continue
            value = row[kind] * scale
            if unit == "MiB" and min(value, base[kind]) < 1:  # within what the process holds anyway
                cells += ["< 1 MiB" if value < 1 else f"{value:.0f} MiB", ""]
                continue
            cells.append(f"{value:.0f} {unit}" if value >= 10 else f"{value:.2f} {unit}")
            cells.append(f"{base[kind] / row[kind]:.{1 if SAELENS in results else 2}f}×")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def conditions(options: Options, rounds: int) -> dict[str, Any]:
    chosen = {k: v for k, v in asdict(options).items() if k not in ("out", "memory_of")}
    return {
        **chosen,
        "rounds": rounds,
        "widths": paper_widths(options.d_sae),
        **records.machine(options.device),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    parser.add_arguments(Preset, dest="preset")
    arguments = parser.parse_args()
    options: Options = arguments.options
    preset: Preset = arguments.preset
    if problem := _device_problem(options.device) or _preset_problem(options, preset):
        parser.error(problem)
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.cuda.set_device(torch.device(options.device).index or 0)
    try:
        if options.memory_of is not None:
            print(measure_memory(options, options.memory_of))
        elif preset.preset is None:
            run_table(options)
        else:
            run_preset(options, preset)
    except DoesNotFit as error:
        sys.exit(f"{error}; take a larger GPU or smaller sizes (--shrink 2 halves a preset's)")


def _device_problem(device: str) -> str | None:
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = ["cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{i}" for i in range(n_gpus))]
    if device in accepted:
        return None
    return (
        f"--device {device}: PyTorch {torch.__version__} finds {n_gpus or 'no'} CUDA devices; "
        f"accepted here: {', '.join(accepted)}"
    )


def _preset_problem(options: Options, preset: Preset) -> str | None:
    if not 1 <= preset.shrink <= LARGEST_SHRINK:
        return f"--shrink {preset.shrink}: accepted are 1 to {LARGEST_SHRINK}"
    if options.rounds is not None and options.rounds < 1:
        return f"--rounds {options.rounds}: accepted are 1 and more"
    if preset.preset not in (None, "sweep", *presets.PRESETS):
        return f"--preset {preset.preset}: accepted are {', '.join(presets.PRESETS)} and sweep"
    if preset.preset is None:
        return "--shrink needs a --preset" if preset.shrink != 1 else None
    fixed = ("d_in", "d_sae", "batch_size", "k", "dtype", "autocast", "variants", "memory_of")
    given = [f"--{name}" for name in fixed if getattr(options, name) != getattr(Options(), name)]
    if given:
        return f"--preset {preset.preset} leaves no choice of {', '.join(given)}"
    return None


def run_preset(options: Options, preset: Preset) -> None:
    assert preset.preset is not None
    flags = ["--preset", preset.preset]
    if preset.shrink != 1:
        flags += ["--shrink", str(preset.shrink)]
    job = presets.Job(
        device=options.device,
        n_dead=options.n_dead,
        shrink=preset.shrink,
        rounds=PRESET_ROUNDS if options.rounds is None else options.rounds,
        threads=options.threads,
        command=" ".join([_command(options), *flags]),
        out=options.out,
    )
    if preset.preset == "sweep":
        growth.run(job)
    else:
        presets.run(preset.preset, job)


def run_table(options: Options) -> None:
    rounds = ROUNDS if options.rounds is None else options.rounds
    peers = [SAELENS, SAELENS_FLAT, *([PEER] if has_peer() else [])]
    names = [OURS, *VARIANTS] if options.variants else [OURS, OURS_FLAT, REFERENCE, *peers]
    results = median_times(options, names, rounds)
    for name in tqdm(names, desc="Memory", disable=None):
        results[name]["memory_mib"] = _memory_in_own_process(options, name)
    described = conditions(options, rounds)
    text = report(options, results, described)
    print(text)
    records.save(options.out, text, {"conditions": described, "results": results})


def report(
    options: Options, results: dict[str, dict[str, float]], described: dict[str, Any]
) -> str:
    """The command, its table, the ratios that sum it up, and the conditions, as Markdown."""
    ours, encode = results[OURS], results[ENCODE]["forward_backward"]
    flat, peer = results.get(OURS_FLAT), results.get(SAELENS)
    ratios = (
        {}
        if flat is None or peer is None
        else {
            "forward-backward, SAELens / ours": peer["forward_backward"] / ours["forward_backward"],
            "full step, SAELens / ours": peer["step"] / ours["step"],
            "forward-backward, ours / encode product": ours["forward_backward"] / encode,
            "forward-backward, five levels / one level": ours["forward_backward"]
            / flat["forward_backward"],
        }
    )
    return "\n".join(
        [
            f"`{_command(options)}`",
            "",
            table(results),
            "",
            *(f"- {name}: {value:.2f}" for name, value in ratios.items()),
            "",
            ", ".join(f"{name} {value}" for name, value in described.items()),
            "",
        ]
    )


def _command(options: Options) -> str:
    """The command line that repeats this run."""
    defaults = asdict(Options())
    flags = [
        f"--{name} {value}"
        for name, value in asdict(options).items()
        if value != defaults[name] and name != "out"
    ]
    return " ".join(["python benchmarks/step_time.py", *flags])


if __name__ == "__main__":
    main()
