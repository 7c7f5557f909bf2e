"""Time and memory of one training step: this package against its peers, interleaved in one process.

    python benchmarks/step_time.py                       # the shape of docs/benchmarks/step_time.md
    python benchmarks/step_time.py --d_in 768 --d_sae 24576 --k 40 --threads 2 --n_dead 500
    python benchmarks/step_time.py --variants            # the objective's options, against default
    python benchmarks/step_time.py --device cuda --preset gemma    # or gemma_4096, gpt2, sweep

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

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import growth
import presets
import records
import torch
from contestants import (
    DEAD_SHARES,
    ENCODE,
    OURS,
    OURS_FLAT,
    PEER,
    REFERENCE,
    SAELENS,
    SAELENS_FLAT,
    SAELENS_FUSED,
    SELECTION,
    VARIANTS,
    Setup,
    dead_ending,
    has_peer,
    make_contestant,
    selection,
)
from measuring import DoesNotFit, build, gpu_peak, time_steps
from options import Options
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka.training.widths import paper_widths


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
    options: Options = parser.parse_args().options
    try:
        options.check()
    except ValueError as error:
        parser.error(str(error))
    records.silence_libraries()
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.cuda.set_device(torch.device(options.device).index or 0)
    try:
        if options.preset is None:
            run_table(options)
        elif options.preset == "sweep":
            growth.run(options)
        else:
            presets.run(options.preset, options)
    except DoesNotFit as error:
        sys.exit(f"{error}; take a larger GPU or smaller sizes (--shrink 2 halves a preset's)")


def run_table(options: Options) -> None:
    peers = [SAELENS, SAELENS_FUSED, SAELENS_FLAT, *([PEER] if has_peer() else [])]
    dead = [OURS + dead_ending(share) for share in DEAD_SHARES] if options.n_dead == 0 else []
    names = [OURS, OURS_FLAT, *dead, REFERENCE, *peers]
    if options.variants:
        names = [OURS, *VARIANTS]
    setup = setup_of(options)
    alone = {(SELECTION, "forward_backward"): selection(setup)}
    results = time_steps(build(names, setup), setup, options.n_rounds, alone=alone)
    for name in tqdm([n for n in names if not n.endswith("dead")], desc="Memory", disable=None):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            memory = process.submit(measure_memory, options, name).result()
        results[name]["memory_bytes"] = {"step": memory}
    record = {**options.record(widths=setup.widths), "results": results}
    table = records.step_table(results, OURS if options.variants else SAELENS)
    monitor = records.monitor_line(results)
    print(records.save(options.out, record, table, _ratios(results), monitor))


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
        "full step, SAELens with fused Adam / ours": step[SAELENS_FUSED] / step[OURS],
        "selection / encode product": part[SELECTION] / part[ENCODE],
        "forward-backward, ours / encode product": part[OURS] / part[ENCODE],
        "forward-backward, five levels / one level": part[OURS] / part[OURS_FLAT],
    }
    for name in step:
        if name.startswith(OURS) and name.endswith("dead"):
            ratios[f"full step, {name} / none"] = step[name] / step[OURS]
    return "\n".join(f"- {name}: {value:.2f}" for name, value in ratios.items())


if __name__ == "__main__":
    main()
