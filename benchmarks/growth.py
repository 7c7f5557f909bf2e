"""How the time of a step grows with one size at a time, and a plot of it."""

from contextlib import suppress
from typing import Any

import records
from ceilings import FLOAT32, TF32, precisions
from contestants import OURS, SAELENS, SAELENS_FLAT, Setup, our_implementations
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from measuring import DoesNotFit, build, free_memory, measure_times, spread, turns_of
from options import Options
from presets import shape, warning
from tqdm.auto import tqdm

from sae_lens_matryoshka.util.markdown import markdown_table

BASE = {"d_in": 768, "d_sae": 32768, "batch_size": 4096}
K, N_LEVELS = 40, 5
AXES: dict[str, list[int]] = {
    "d_sae": [2**n for n in range(12, 19)],
    "levels": [1, 2, 3, 5, 7, 10],
    "k": [10, 20, 40, 80, 160, 320],
    "batch_size": [2**n for n in range(10, 15)],
}


def doubling_widths(d_sae: int, n_levels: int) -> list[int]:
    """Levels that are each twice as wide as the one inside.

    Levels in equal steps would cost SAELens more: it decodes the second largest level twice.
    """
    widths = [d_sae >> halvings for halvings in reversed(range(n_levels))]
    if widths[0] == 0:
        raise ValueError(f"{n_levels} levels that double do not fit into {d_sae} latents")
    return widths


def setup_at(axis: str, size: int, options: Options) -> Setup:
    """The base, with one size replaced."""
    sizes: dict[str, Any] = {**BASE, "k": K, "levels": N_LEVELS, axis: size}
    sizes |= {name: sizes[name] // options.shrink for name in BASE}
    widths = doubling_widths(sizes["d_sae"], sizes.pop("levels"))
    return Setup(
        **sizes,
        widths=widths,
        n_dead=options.n_dead,
        skewed=options.skewed,
        device=options.device,
    )


def run(options: Options) -> None:
    """Measure one axis after the other, and write what there is after each point."""
    precision = TF32 if TF32 in precisions(options.device) else FLOAT32
    names = [f"{OURS}, {our_implementations(options.device)[0]}", SAELENS, SAELENS_FLAT]
    record = {**options.record(precision=precision.name), "axes": {}}
    for axis, sizes in AXES.items():
        measured = record["axes"][axis] = []
        for size in tqdm(sizes, desc=axis, disable=None):
            setup = setup_at(axis, size, options)
            with precision.applied():
                steps = _steps(names, setup, options.n_rounds)
            actual = len(setup.widths) if axis == "levels" else getattr(setup, axis)
            measured.append({"size": actual, **shape(setup), "steps": steps})
            tables = (table(name, points) for name, points in record["axes"].items())
            records.save(options.out, record, warning(options), *tables)
        print(table(axis, measured), flush=True)
        if options.out is not None:
            plot(record).savefig(f"{options.out}.png", dpi=130)


def _steps(names: list[str], setup: Setup, rounds: int) -> dict[str, dict[str, float] | None]:
    """Time of a full step of each, in turn; None for one that does not fit into memory alone."""
    together, alone = list(names), []
    found: dict[str, dict[str, float]] = {}
    while together and not found:
        try:
            found = _measure(together, setup, rounds)
        except DoesNotFit as error:
            together.remove(error.name)
            alone.append(error.name)
        free_memory()
    for name in alone:
        with suppress(DoesNotFit):
            found |= _measure([name], setup, rounds)
        free_memory()
    return {name: found.get(name) for name in names}


def _measure(names: list[str], setup: Setup, rounds: int) -> dict[str, dict[str, float]]:
    turns = turns_of(build(names, setup), ["step"])
    times = measure_times(turns, rounds, setup.device)
    return {name: spread(values) for (name, _), values in times.items()}


def table(axis: str, measured: list[dict[str, Any]]) -> str:
    """One axis as Markdown; an empty cell is a step that does not fit into memory."""
    rows = [
        [
            f"{point['d_in']} × {point['d_sae']}",
            str(len(point["widths"])),
            str(point["k"]),
            str(point["batch_size"]),
            *(
                records.milliseconds(step["median"]) if step else ""
                for step in point["steps"].values()
            ),
        ]
        for point in measured
    ]
    titles = ["d_in × d_sae", "levels", "k", "batch", *measured[0]["steps"]]
    return f"**{axis}**: time of a full step\n\n{markdown_table(titles, rows, n_text=0)}"


def plot(record: dict[str, Any]) -> Figure:
    """A panel for each axis: milliseconds of a full step, median, 10th to 90th percentile."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    facts = record["conditions"]
    d_in, d_sae, batch_size = (size // facts["shrink"] for size in BASE.values())
    figure.suptitle(
        f"Full step on {facts['processor']}, {facts['precision']}: d_in {d_in}, otherwise d_sae "
        f"{d_sae}, {N_LEVELS} levels, k {K}, batch {batch_size}"
    )
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
