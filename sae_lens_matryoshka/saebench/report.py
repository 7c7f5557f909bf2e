"""The results of an evaluation as a table, plots and a page to open in a browser."""

import base64
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from jinja2 import StrictUndefined, Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, Metric
from sae_lens_matryoshka.saebench.records import Record
from sae_lens_matryoshka.saebench.scores import (
    Score,
    comparisons,
    l0_by_key,
    not_run,
    read_scores,
    write_summary,
)
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

_COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_SPREAD = (
    "± is the standard deviation over the seeds of the evaluation. It does not include the spread "
    "over SAEs trained with other seeds."
)


def write_report(record: Record, out: Path, is_finished: bool = True) -> str:
    """Write `summary.json`, `table.md`, `scores.png` and `report.html`.

    Args:
        record: What `out` holds results of.
        out: Output folder.
        is_finished: Whether the whole plan was run; if not, the report says so.

    Returns:
        The table and the remarks below it, as in `table.md`.
    """
    scores = read_scores(record, out)
    write_summary(record, scores, out)
    titles, rows = _table(record, scores)
    remarks = _remarks(record, scores)
    if not is_finished:
        remarks.insert(0, "Stopped before everything was run: run the same command to resume.")
    text = "\n".join([markdown_table(titles, rows), "", *(f"- {remark}" for remark in remarks)])
    with atomic_file(out / "table.md") as unfinished:
        unfinished.write_text(text + "\n")
    plot = None
    if headlines := [score for score in scores if score.is_headline]:
        with atomic_file(out / "scores.png") as unfinished:
            _figure(headlines, l0_by_key(scores)).savefig(unfinished, dpi=110)
        plot = base64.b64encode((out / "scores.png").read_bytes()).decode()
    template = Template(_TEMPLATE.read_text(), autoescape=True, undefined=StrictUndefined)
    page = template.render(record=record, titles=titles, rows=rows, remarks=remarks, plot=plot)
    with atomic_file(out / "report.html") as unfinished:
        unfinished.write_text(page + "\n", encoding="utf-8")
    return text


def _table(record: Record, scores: list[Score]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the rows in the order of the candidates: never by score."""
    by_cell = {(score.candidate.key, score.metric): score for score in scores}
    metrics = list(dict.fromkeys(score.metric for score in scores))
    n_seeds = {m: max(len(s.values) for s in scores if s.metric == m) for m in metrics}

    def cell(key: str, metric: Metric) -> str:
        if (score := by_cell.get((key, metric))) is None:
            return ""
        n = len(score.values)
        return str(score) if n == n_seeds[metric] else f"{score} ({n} of {n_seeds[metric]} seeds)"

    rows = [[c.label, str(c.width), *(cell(c.key, m) for m in metrics)] for c in record.candidates]
    return ["SAE", "width", *(metric.label for metric in metrics)], rows


def _remarks(record: Record, scores: list[Score]) -> list[str]:
    """The sentences that a reader of the table needs."""
    remarks = comparisons(scores)
    seeds = {len(score.values) for score in scores if EVALUATIONS[score.evaluation].is_random}
    if seeds:
        remarks.append(
            "One seed: no spread is known, so nothing is ranked." if seeds == {1} else _SPREAD
        )
    for evaluation in dict.fromkeys(score.evaluation for score in scores):
        if (note := EVALUATIONS[evaluation].note) is not None:
            remarks.append(f"{evaluation} {note}")
    if scores and not l0_by_key(scores):
        remarks.append("L0 is measured by core, which was not run.")
    by_reason: dict[tuple[str, str], list[str]] = {}
    for evaluation, title, reason in not_run(record):
        by_reason.setdefault((evaluation, reason), []).append(title)
    for (evaluation, reason), saes in by_reason.items():
        of = "" if len(saes) == len(record.candidates) else f" of {'; '.join(saes)}"
        remarks.append(f"Not run: {evaluation}{of}: {reason}.")
    return remarks


def _figure(headlines: list[Score], l0: Mapping[str, float]) -> Figure:
    """Each evaluation's first metric against width and, where core measured it, against L0."""
    by_evaluation: dict[str, list[Score]] = {}
    for score in headlines:
        by_evaluation.setdefault(score.evaluation, []).append(score)
    widths = {score.candidate.key: float(score.candidate.width) for score in headlines}
    x_axes = {"width (latents)": widths} | ({"L0 (active latents per token)": l0} if l0 else {})
    n_columns = len(by_evaluation)
    figure = Figure(figsize=(max(4.2 * n_columns, 6), 3.6 * len(x_axes)), layout="constrained")
    grid = figure.subplots(len(x_axes), n_columns, squeeze=False)
    for row, (x_label, xs) in zip(grid, x_axes.items(), strict=True):
        for axis, scores in zip(row, by_evaluation.values(), strict=True):
            _draw(axis, scores, xs)
            metric = scores[0].metric
            better = "lower" if metric.lower_is_better else "higher"
            axis.set(xlabel=x_label, ylabel=f"{metric.label} ({better} is better)")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))
    return figure


def _draw(axis: Axes, scores: list[Score], xs: Mapping[str, float]) -> None:
    """Levels joined by a line, baselines as squares, bars of one standard deviation."""
    by_label: dict[str, list[Score]] = {}
    for score in scores:
        by_label.setdefault(score.candidate.label, []).append(score)
    for (label, group), color in zip(by_label.items(), cycle(_COLORS)):
        points = sorted(
            (xs[score.candidate.key], score.mean, score.std or 0)
            for score in group
            if score.candidate.key in xs
        )
        if not points:
            continue
        x, means, stds = zip(*points, strict=True)
        is_baseline = group[0].candidate.is_baseline
        axis.errorbar(
            x,
            means,
            yerr=stds,
            fmt="s" if is_baseline else "o-",
            color="tab:gray" if is_baseline and len(by_label) == 2 else color,
            capsize=3,
            label=label if is_baseline else f"{label}, levels",
        )
    axis.grid(alpha=0.3)
    ticks = sorted({xs[score.candidate.key] for score in scores if score.candidate.key in xs})
    if ticks and ticks[-1] > 10 * ticks[0]:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in ticks], rotation=45)
        axis.minorticks_off()
