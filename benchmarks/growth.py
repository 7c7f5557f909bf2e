"""How the time of a step grows along one size at a time, and its plot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import records
from contestants import OURS, SAELENS, SAELENS_FLAT, Setup, our_implementations
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from measuring import DoesNotFit, build, free_memory, measure_times, spread, turns_of
from precisions import FLOAT32, TF32, Precision, precisions
from presets import WARM_UP, Job, milliseconds, shape, warning
from tqdm.auto import tqdm

BASE = {"d_in": 768, "d_sae": 32768, "batch_size": 4096}
K, N_LEVELS = 40, 5
AXES: dict[str, list[int]] = {
    "d_sae": [2**n for n in range(12, 19)],
    "levels": [1, 2, 3, 5, 7, 10],
    "k": [10, 20, 40, 80, 160, 320],
    "batch_size": [2**n for n in range(10, 15)],
}


def doubling_widths(d_sae: int, n_levels: int) -> list[int]:
    """Each level twice as wide as the one inside it, so that inner levels are narrow.

    Levels at even distances would cost SAELens more: it decodes the second largest level twice.
    """
    widths = [d_sae >> halvings for halvings in reversed(range(n_levels))]
    if widths[0] == 0:
        raise ValueError(f"{n_levels} levels that double do not fit into {d_sae} latents")
    return widths


def points(job: Job, precision: Precision) -> Iterator[tuple[str, list[Setup]]]:
    """Each axis with its points: the base, with one size replaced."""
    base: dict[str, Any] = {name: size // job.shrink for name, size in BASE.items()}
    for axis, sizes in AXES.items():
        setups = []
        for size in sizes:
            sizes_here = {**base, "k": K}
            if axis != "levels":
                sizes_here[axis] = size // job.shrink if axis in base else size
            n_levels = size if axis == "levels" else N_LEVELS
            setups.append(
                Setup(
                    **sizes_here,
                    widths=doubling_widths(sizes_here["d_sae"], n_levels),
                    n_dead=job.n_dead,
                    device=job.device,
                    autocast=precision.autocast,
                )
            )
        yield axis, setups


def run(job: Job) -> None:
    """Measure one axis after the other, and write what there is after each point."""
    precision = TF32 if TF32 in precisions(job.device) else FLOAT32
    names = [f"{OURS}, {our_implementations(job.device)[0]}", SAELENS, SAELENS_FLAT]
    record: dict[str, Any] = {
        "command": job.command,
        "conditions": {"precision": precision.name, **job.described()},
        "axes": {},
    }
    for axis, setups in points(job, precision):
        measured = record["axes"][axis] = []
        for setup in tqdm(setups, desc=axis, disable=None):
            with precision.applied():
                steps = _steps(names, setup, job.rounds)
            measured.append({"size": size_of(axis, setup), **shape(setup), "steps": steps})
            records.save(job.out, report(record), record)
        print(table(axis, measured), flush=True)
        if job.out is not None:
            plot(record).savefig(f"{job.out}.png", dpi=130)


def size_of(axis: str, setup: Setup) -> float:
    return len(setup.widths) if axis == "levels" else getattr(setup, axis)


def _steps(names: list[str], setup: Setup, rounds: int) -> dict[str, dict[str, float] | None]:
    """Time of a full step of each; None for one that does not fit, even with the memory to itself.

    They take turns as long as they fit side by side.
    """
    together, alone = list(names), []
    found: dict[str, dict[str, float]] = {}
    while together and not found:
        try:
            found = _measure(together, setup, rounds)
        except DoesNotFit as error:
            refused = error.name
            together.remove(refused)
            alone.append(refused)
        free_memory()
    for name in alone:
        with suppress(DoesNotFit):
            found |= _measure([name], setup, rounds)
        free_memory()
    return {name: found.get(name) for name in names}


def _measure(names: list[str], setup: Setup, rounds: int) -> dict[str, dict[str, float]]:
    turns = turns_of(build(names, setup), ["step"])
    times = measure_times(turns, rounds, WARM_UP, setup.device)
    return {name: spread(values) for (name, _), values in times.items()}


def table(axis: str, measured: list[dict[str, Any]]) -> str:
    """One axis as Markdown; an empty cell stands for a step that does not fit into memory."""
    names = list(measured[0]["steps"])
    lines = [
        f"| {' | '.join(['d_in × d_sae', 'levels', 'k', 'batch', *names])} |",
        "|" + "---:|" * (4 + len(names)),
    ]
    for point in measured:
        cells = [
            f"{point['d_in']} × {point['d_sae']}",
            len(point["widths"]),
            point["k"],
            point["batch_size"],
            *(milliseconds(step["median"]) if step else "" for step in point["steps"].values()),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(["", f"**{axis}**: time of a full step", "", *lines, ""])


def report(record: dict[str, Any]) -> str:
    """The command, a table for each axis, and the conditions, as Markdown."""
    tables = [table(axis, measured) for axis, measured in record["axes"].items()]
    conditions = ", ".join(f"{k} {v}" for k, v in record["conditions"].items())
    return "\n".join([f"`{record['command']}`", *warning(record), *tables, conditions, ""])


def _base(facts: dict[str, Any]) -> str:
    sizes = {name: size // facts["shrink"] for name, size in BASE.items()}
    return (
        f"d_in {sizes['d_in']}, and where nothing else is said d_sae {sizes['d_sae']}, {N_LEVELS} "
        f"levels, k {K}, batch {sizes['batch_size']}"
    )


def plot(record: dict[str, Any]) -> Figure:
    """A panel for each axis: milliseconds of a full step, median, 10th to 90th percentile."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    facts = record["conditions"]
    figure.suptitle(f"Full step on {facts['processor']}, {facts['precision']}: {_base(facts)}")
    panels = figure.subplots(2, 2).flat
    for panel, (axis, measured) in zip(panels, record["axes"].items(), strict=False):
        for name in measured[0]["steps"]:
            fitting = [point for point in measured if point["steps"][name] is not None]
            sizes = [point["size"] for point in fitting]
            low, middle, high = (
                [1e3 * point["steps"][name][quantile] for point in fitting]
                for quantile in ("p10", "median", "p90")
            )
            (line,) = panel.plot(sizes, middle, marker="o", markersize=4, label=name)
            panel.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set(xlabel=axis, ylabel="full step, ms (log)", yscale="log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if axis != "levels":
            panel.set_xscale("log")
        sizes = [point["size"] for point in measured]
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.axes[0].legend()
    return figure
