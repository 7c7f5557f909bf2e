"""The command `eval`, which runs SAEBench on SAEs and their levels."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sae_lens_matryoshka.cli.levels import widths_argument
from sae_lens_matryoshka.hub.load import located
from sae_lens_matryoshka.runs.dry_run import go_offline
from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, installed, unmet_need
from sae_lens_matryoshka.saebench.report import AGAIN, write_report
from sae_lens_matryoshka.saebench.suite import (
    DEFAULT_EVALUATIONS,
    Record,
    Settings,
    check_names,
    check_options,
    plan_suite,
    run_suite,
)


def plan_eval(parser: argparse.ArgumentParser, words: list[str]) -> Callable[[], int]:
    """`eval SAE … --out DIR`: SAEBench on every level, with tables and plots."""
    parser.usage = "%(prog)s SAE [SAE ...] --out DIR [options] [--EVALUATION.FIELD VALUE ...]"
    parser.description = (
        "Run SAEBench on SAEs and each of their levels. An SAE is a folder, or release:id. What a "
        "folder holds already is not run again. Fields of SAEBench's configs are set by "
        "--EVALUATION.FIELD VALUE, lists as '[a, b]'; an unknown field names all."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "evaluations:\n" + "\n".join(
        f"  {name}" + (f": needs {evaluation.needs}" if evaluation.needs else "")
        for name, evaluation in EVALUATIONS.items()
    )
    parser.add_argument("saes", nargs="+", metavar="SAE", help="evaluated level by level")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="SAE", help="baselines, each evaluated whole"
    )
    parser.add_argument(
        "--levels",
        type=_levels,
        default="all",
        help="all (default), or numbers from 1 on: 1,3",
    )
    parser.add_argument(
        "--evals",
        type=lambda text: text.split(","),
        default=list(DEFAULT_EVALUATIONS),
        metavar="E,E,…",
        help=f"default: {','.join(DEFAULT_EVALUATIONS)}",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="seeds of each, but for core, which has no chance in it (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--model", help="the model's name, where an SAE does not say it")
    parser.add_argument(
        "--matryoshka-widths",
        type=widths_argument,
        metavar="W,W,…",
        help="level widths, for SAEs that do not say their own",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check names, levels and paths without a network"
    )
    parsed, others = parser.parse_known_args(words)
    installed()
    settings = _settings(others)
    check_names(parsed.evals, settings)
    # A dry run may be for another machine.
    device = "cpu" if parsed.dry_run else parsed.device
    check_options(parsed.out, parsed.seeds, parsed.model, device)
    options = {
        "levels": None if parsed.levels == "all" else parsed.levels,
        "evaluations": parsed.evals,
        "n_seeds": parsed.seeds,
        "settings": settings,
        "matryoshka_widths": parsed.matryoshka_widths,
        "model_name": parsed.model,
        "device": device,
    }
    saes, against = ([_source(text) for text in texts] for texts in (parsed.saes, parsed.against))
    run = _dry_run if parsed.dry_run else _evaluate
    return partial(run, saes, against, parsed.out, options)


def _evaluate(
    saes: list[list[str]], against: list[list[str]], out: Path, options: dict[str, Any]
) -> int:
    plan = plan_suite(saes, out, against=against, **options)
    signal.signal(signal.SIGTERM, _stop)  # so that SAEBench, in a process of its own, ends too
    try:
        record = run_suite(plan)
    except (KeyboardInterrupt, SystemExit):
        write_report(plan.record, out, is_finished=False)
        print(f"\nStopped. {out} has what is finished; {AGAIN}", file=sys.stderr)
        raise
    print(f"\n{write_report(record, out)}\n\n{out / 'report.html'} has the same with plots.")
    asked = {candidate.key for candidate in plan.candidates}
    missing = (asked & record.not_run[evaluation].keys() for evaluation in plan.evaluations)
    return int(any(missing))


def _stop(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)


def _dry_run(
    saes: list[list[str]], against: list[list[str]], out: Path, options: dict[str, Any]
) -> int:
    """Check what can be checked without a network, and say what can't."""
    go_offline()
    here: dict[str, list[list[str]]] = {"saes": [], "against": []}
    for name, sources in (("saes", saes), ("against", against)):
        for source in sources:
            if len(source) == 2:
                repo_id, folder = located(*source)
                print(f"{':'.join(source)}: {folder} of {repo_id}, not downloaded")
            elif Path(source[0]).is_dir():
                here[name].append(source)
            else:
                print(f"{source[0]}: not there yet")
    for evaluation in options["evaluations"]:
        if (need := unmet_need(evaluation)) is not None:
            print(f"{evaluation} {need}")
    Record.read(out)
    if any(here.values()):
        try:
            plan = plan_suite(here["saes"], out, against=here["against"], **options)
        except OSError as error:
            print(f"Not checked: {error}")
        else:
            for candidate in plan.candidates:
                print(f"{candidate.title}: {plan.record.hook_names[candidate.label]}, there")
    seeds = f"{options['n_seeds']} seed{'s' if options['n_seeds'] > 1 else ''}"
    print(f"Would run {', '.join(options['evaluations'])} with {seeds}, into {out}.")
    return 0


def _source(text: str) -> list[str]:
    """What `load_sae` takes: a folder, or a release and an SAE's id."""
    release, colon, sae_id = text.partition(":")
    return [release, sae_id] if colon and not Path(text).exists() else [text]


def _levels(text: str) -> Sequence[int] | str:
    if text == "all":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give all, or numbers from 1 on such as 1,3"
        ) from None


def _settings(words: list[str]) -> Settings:
    """`--evaluation.field value …` as evaluation → field → value; values are read as YAML."""
    settings: dict[str, dict[str, Any]] = {}
    pairs = iter(words)
    for flag in pairs:
        name, equals, value = flag.removeprefix("--").partition("=")
        evaluation, dot, field = name.partition(".")
        if not flag.startswith("--") or not dot:
            raise ValueError(
                f"{flag!r} is not an option; --help names them, and --EVALUATION.FIELD VALUE sets "
                "a field of SAEBench's."
            )
        if not equals:
            value = next(pairs, None)
            if value is None:
                raise ValueError(f"{flag} lacks a value.")
        try:
            settings.setdefault(evaluation, {})[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag}={value!r} can't be read: give YAML.") from error
    return settings
