"""Time and memory of one training step: this package against its peers, interleaved in one process.

    python benchmarks/step_time.py                       # the shape of docs/benchmarks/step_time.md
    python benchmarks/step_time.py --d_in 768 --d_sae 24576 --k 40 --threads 2 --n_dead 500
    python benchmarks/step_time.py --variants            # the objective's options, against default
    python benchmarks/step_time.py --device cuda --preset gemma    # or gpt2, or sweep

A step is SAELens' own: forward, statistics, backward, gradient clipping and Adam, as
`SAETrainer.step` runs it, 2,000 steps into a run, when the monitor of our SAEs observes. What the
monitor adds is a figure of its own. Forward-backward is the SAE's part alone. Peers that are not
installed are left out. Times are medians over rounds in which every contestant takes one turn;
ratios within a run hold where absolute times drift. Memory is what a step adds at its peak to
parameters and moments, in a process that runs this contestant alone.

A preset is a published shape in every precision of the device, against the floor that its measured
matrix rate and bandwidth leave (presets.py, ceilings.py); `sweep` lets one size grow at a time
(growth.py). On a GPU presets report the memory at the peak beyond parameters, gradients and
moments; on a CPU none. `--shrink` runs presets on a small machine.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
    Setup,
    has_peer,
    make_contestant,
)
from measuring import DoesNotFit, build, gpu_peak, time_steps
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.widths import paper_widths
from sae_lens_matryoshka.util.checks import checked_count, invalid_option
from sae_lens_matryoshka.util.devices import check_device

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


@dataclass
class Preset:
    """Fixed shapes and precisions; of the options above it takes n_dead, threads, device, rounds
    and out."""

    preset: str | None = None  # gemma, gpt2, or sweep (which also writes OUT.png)
    shrink: int = 1  # divide d_in, d_sae and batch by this, to try a preset on a small machine


def setup_of(options: Options) -> Setup:
    shared = {f.name: getattr(options, f.name) for f in fields(Setup) if f.name != "widths"}
    return Setup(**shared, widths=paper_widths(options.d_sae))


def measure_memory(options: Options, name: str) -> int:
    """Bytes that a step of `name` adds at its peak, in a process of its own."""
    torch.set_num_threads(options.threads)
    contestant = make_contestant(name, setup_of(options))
    for _ in range(3):
        contestant.step()
    if options.device != "cpu":
        return gpu_peak(contestant.step)
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(3):
        contestant.step()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    parser.add_arguments(Preset, dest="preset")
    arguments = parser.parse_args()
    options: Options = arguments.options
    preset: Preset = arguments.preset
    try:
        _check(options, preset)
    except ValueError as error:
        parser.error(str(error))
    records.silence_libraries()
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.cuda.set_device(torch.device(options.device).index or 0)
    try:
        if preset.preset is None:
            run_table(options)
        else:
            run_preset(options, preset)
    except DoesNotFit as error:
        sys.exit(f"{error}; take a larger GPU or smaller sizes (--shrink 2 halves a preset's)")


def _check(options: Options, preset: Preset) -> None:
    check_device("--device", options.device)
    checked_count("--rounds", 1 if options.rounds is None else options.rounds)
    if not 1 <= preset.shrink <= LARGEST_SHRINK:
        raise invalid_option("--shrink", preset.shrink, f"1 to {LARGEST_SHRINK}")
    if preset.preset is None:
        if preset.shrink != 1:
            raise ValueError("--shrink needs a --preset")
        return
    accepted = [*presets.PRESETS, "sweep"]
    if preset.preset not in accepted:
        raise invalid_option("--preset", preset.preset, " or ".join(accepted))
    fixed = ("d_in", "d_sae", "batch_size", "k", "dtype", "autocast", "variants")
    given = [f"--{name}" for name in fixed if getattr(options, name) != getattr(Options(), name)]
    if given:
        raise ValueError(f"--preset {preset.preset} leaves no choice of {', '.join(given)}")


def run_preset(options: Options, preset: Preset) -> None:
    assert preset.preset is not None
    job = presets.Job(
        device=options.device,
        n_dead=options.n_dead,
        shrink=preset.shrink,
        rounds=PRESET_ROUNDS if options.rounds is None else options.rounds,
        threads=options.threads,
        command=records.command("step_time.py", options, preset),
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
    setup = setup_of(options)
    results = time_steps(build(names, setup), setup, rounds, warm_up=2)
    for name in tqdm(names, desc="Memory", disable=None):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            memory = process.submit(measure_memory, options, name).result()
        results[name]["memory_bytes"] = {"step": memory}
    record = {
        "command": records.command("step_time.py", options),
        "conditions": {
            **{k: v for k, v in asdict(options).items() if k != "out"},
            "rounds": rounds,
            "widths": setup.widths,
            **records.machine(options.device),
        },
        "results": results,
    }
    table = records.step_table(results, OURS if options.variants else SAELENS)
    text = records.text(record, table, _ratios(results), records.monitor_line(results))
    print(text)
    records.save(options.out, text, record)


def _ratios(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The ratios that sum up a comparison with the peers."""
    if SAELENS not in results:
        return ""
    part, step = (
        {name: row[kind]["median"] for name, row in results.items() if kind in row}
        for kind in ("forward_backward", "step")
    )
    ratios = {
        "forward-backward, SAELens / ours": part[SAELENS] / part[OURS],
        "full step, SAELens / ours": step[SAELENS] / step[OURS],
        "forward-backward, ours / encode product": part[OURS] / part[ENCODE],
        "forward-backward, five levels / one level": part[OURS] / part[OURS_FLAT],
    }
    return "\n".join(f"- {name}: {value:.2f}" for name, value in ratios.items())


if __name__ == "__main__":
    main()
