"""The results of an evaluation as a table, as plots and as a page to open in a browser."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lens_matryoshka.saebench.candidates import Candidate
from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, L0, Metric
from sae_lens_matryoshka.saebench.scores import (
    Score,
    comparisons,
    l0_of,
    not_run,
    read_scores,
    spread,
    write_summary,
)
from sae_lens_matryoshka.saebench.suite import Record
from sae_lens_matryoshka.util.files import atomic_file

_COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")
AGAIN = "give the same command again to go on."
_SPREAD = (
    "± is the standard deviation over the seeds of the evaluation, and says nothing of how SAEs "
    "trained with other seeds would score."
)


def write_report(record: Record, out: Path, is_finished: bool = True) -> str:
    """Write `summary.json`, `table.md`, `scores.png` and `report.html`.

    Args:
        record: What `out` holds results of.
        out: Output folder.
        is_finished: Whether all that was asked for was tried; the report says so if it was not.

    Returns:
        The table and the sentences below it, as `table.md` has them.
    """
    scores = read_scores(record, out)
    write_summary(record, scores, out)
    columns, rows = _cells(record, scores)
    remarks = _remarks(record, scores)
    if not is_finished:
        remarks.insert(0, f"Stopped before all was run: {AGAIN}")
    table = [
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    text = "\n".join([*table, "", *(f"- {remark}" for remark in remarks)])
    with atomic_file(out / "table.md") as unfinished:
        unfinished.write_text(text + "\n")
    plot = out / "scores.png"
    has_plot = _draw(plot, record, scores)
    with atomic_file(out / "report.html") as unfinished:
        unfinished.write_text(_page(record, columns, rows, remarks, plot if has_plot else None))
    return text


def _cells(record: Record, scores: list[Score]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the rows in the order of the candidates: never by score."""
    by_cell = {(score.candidate.key, score.metric): score for score in scores}
    metrics = list(dict.fromkeys(score.metric for score in scores))
    n_seeds = {m: max(len(s.values) for s in scores if s.metric == m) for m in metrics}
    columns = ["SAE", "width", *(metric.label for metric in metrics)]
    rows = [
        [
            candidate.label,
            str(candidate.width),
            *(
                _cell(score, n_seeds[metric])
                if (score := by_cell.get((candidate.key, metric)))
                else ""
                for metric in metrics
            ),
        ]
        for candidate in record.candidates
    ]
    return columns, rows


def _cell(score: Score, n_seeds: int) -> str:
    n = len(score.values)
    return spread(score) if n == n_seeds else f"{spread(score)} ({n} of {n_seeds} seeds)"


def _remarks(record: Record, scores: list[Score]) -> list[str]:
    """The sentences that a reader of the table needs."""
    seeds = {len(score.values) for score in scores if EVALUATIONS[score.evaluation].is_random}
    remarks = comparisons(scores)
    if seeds:
        remarks.append(
            "One seed: no spread is known, so nothing is ranked." if seeds == {1} else _SPREAD
        )
    for evaluation in record.settings:
        note = EVALUATIONS[evaluation].note
        if note is not None and any(score.evaluation == evaluation for score in scores):
            remarks.append(f"{evaluation} {note}")
    if scores and all(score.metric.key != L0 for score in scores):
        remarks.append("L0 is measured by core, which was not run.")
    return remarks + _not_run(record)


def _not_run(record: Record) -> list[str]:
    titles: dict[tuple[str, str], list[str]] = {}
    for evaluation, title, reason in not_run(record):
        titles.setdefault((evaluation, reason), []).append(title)
    return [
        f"Not run: {evaluation}: {reason}."
        if len(group) == len(record.candidates)
        else f"Not run: {evaluation} of {'; '.join(group)}: {reason}."
        for (evaluation, reason), group in titles.items()
    ]


def _draw(path: Path, record: Record, scores: list[Score]) -> bool:
    """Each evaluation's first metric against width and, where it was measured, against L0."""
    firsts: list[tuple[str, Metric]] = [
        (evaluation, EVALUATIONS[evaluation].metrics[0])
        for evaluation in record.settings
        if any(score.evaluation == evaluation for score in scores)
    ]
    if not firsts:
        return False
    axes_of: list[tuple[str, Callable[[Candidate], float | None]]] = [
        ("width (latents)", lambda candidate: candidate.width)
    ]
    if any(score.metric.key == L0 for score in scores):
        axes_of.append(("L0 (active latents per token)", lambda c: l0_of(scores, c)))
    figure = Figure(figsize=(max(4.2 * len(firsts), 6), 3.6 * len(axes_of)), layout="constrained")
    grid = figure.subplots(len(axes_of), len(firsts), squeeze=False)
    for row, (x_label, x_of) in zip(grid, axes_of, strict=True):
        for axis, (evaluation, metric) in zip(row, firsts, strict=True):
            shown = [
                score
                for score in scores
                if score.evaluation == evaluation and score.metric == metric
            ]
            _draw_scores(axis, shown, x_of)
            better = "lower" if metric.lower_is_better else "higher"
            axis.set(xlabel=x_label, ylabel=f"{metric.label} ({better} is better)")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110)
    return True


def _draw_scores(
    axis: Axes, scores: list[Score], x_of: Callable[[Candidate], float | None]
) -> None:
    """Levels joined by a line, baselines as squares, bars of one standard deviation."""
    labels = list(dict.fromkeys(score.candidate.label for score in scores))
    for label, color in zip(labels, _COLORS * len(labels), strict=False):
        own = [score for score in scores if score.candidate.label == label]
        points = [(x, score) for score in own if (x := x_of(score.candidate)) is not None]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        is_baseline = own[0].candidate.is_baseline
        axis.errorbar(
            [x for x, _ in points],
            [score.mean for _, score in points],
            yerr=[score.std or 0 for _, score in points],
            fmt="s" if is_baseline else "o-",
            color="tab:gray" if is_baseline and len(labels) == 2 else color,
            capsize=3,
            label=label if is_baseline else f"{label}, levels",
        )
    axis.grid(alpha=0.3)
    xs = sorted({x for score in scores if (x := x_of(score.candidate)) is not None})
    if xs and xs[-1] > 10 * xs[0]:
        axis.set_xscale("log")
        axis.set_xticks(xs, [f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in xs], rotation=45)
        axis.minorticks_off()


def _page(
    record: Record,
    columns: list[str],
    rows: list[list[str]],
    remarks: list[str],
    plot: Path | None,
) -> str:
    """A page that needs nothing beside itself."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    items = "\n".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    image = ""
    if plot is not None:
        data = base64.b64encode(plot.read_bytes()).decode()
        image = f'<img alt="Scores against width and L0" src="data:image/png;base64,{data}">'
    settings = "\n".join(
        f"<li>{escape(evaluation)}: {escape(str(values or 'as SAEBench sets them'))}</li>"
        for evaluation, values in record.settings.items()
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>SAEBench on {escape(record.model_name)}</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; white-space: nowrap; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
</style>
<h1>SAEBench on {escape(record.model_name)}</h1>
<div><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<ul>
{items}
</ul>
{image}
<h2>Settings</h2>
<ul>
{settings}
</ul>
</html>
"""
