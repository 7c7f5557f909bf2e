"""`sae-matryoshka eval`: SAEBench on SAEs and their levels."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.cli.options import (
    CommandParser,
    add_device,
    add_widths,
    exit_on_sigterm,
    names,
)
from sae_lens_matryoshka.saebench.evaluations import DEFAULT_EVALUATIONS, EVALUATIONS, unmet_need

Sources = list[list[str]]


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    needs = {name: f" (needs {e.needs})" if e.needs else "" for name, e in EVALUATIONS.items()}
    parser: CommandParser = commands.add_parser(
        "eval",
        help="run SAEBench on each level of SAEs",
        usage="%(prog)s SAE [SAE ...] --out DIR [options] [--EVALUATION.FIELD VALUE ...]",
        description="Run SAEBench on SAEs and each of their levels. An SAE is a folder, or "
        "release:id. Evaluations that the folder holds already are not run again. "
        "--EVALUATION.FIELD VALUE sets a field of SAEBench's configs; lists are written '[a, b]'.",
        epilog=f"evaluations: {', '.join(name + need for name, need in needs.items())}",
    )
    parser.takes_fields = True
    parser.add_argument("saes", nargs="+", metavar="SAE", help="evaluated level by level")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="SAE", help="baselines, each evaluated whole"
    )
    parser.add_argument(
        "--levels", type=_levels, metavar="all|N,N,…", help="all (default), or numbers: 1,3"
    )
    parser.add_argument(
        "--evals",
        type=names,
        default=",".join(DEFAULT_EVALUATIONS),
        metavar="E,E,…",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="seeds of each, except core, in which nothing is random (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--model", help="the model's name, if an SAE's config has none")
    add_widths(parser)
    add_device(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check names, levels and paths without a network"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    saes, against = ([_source(text) for text in texts] for texts in (args.saes, args.against))
    options = {
        "levels": args.levels,
        "evaluations": args.evals,
        "n_seeds": args.seeds,
        "settings": _settings(args.fields),
        "matryoshka_widths": args.matryoshka_widths,
        "model_name": args.model,
        "device": "cpu" if args.dry_run else args.device,  # the run may be on another machine
    }
    return (_dry_run if args.dry_run else _evaluate)(saes, against, args.out, options)


def _evaluate(saes: Sources, against: Sources, out: Path, options: dict[str, Any]) -> int:
    from sae_lens_matryoshka.saebench.report import write_report
    from sae_lens_matryoshka.saebench.suite import plan_suite, run_suite

    plan = plan_suite(saes, out, against=against, **options)
    exit_on_sigterm()
    try:
        record = run_suite(plan)
    except (KeyboardInterrupt, SystemExit):
        write_report(plan.record, out, is_finished=False)
        print(f"\nStopped. {out} has what is finished; the same command resumes.", file=sys.stderr)
        raise
    print(f"\n{write_report(record, out)}\n\n{out / 'report.html'} has the same with plots.")
    planned = {candidate.key for candidate in plan.candidates}
    return int(any(planned & record.not_run[evaluation].keys() for evaluation in plan.evaluations))


def _dry_run(saes: Sources, against: Sources, out: Path, options: dict[str, Any]) -> int:
    """Check what can be checked without a network, and name the rest."""
    from sae_lens_matryoshka.hub.load import repo_and_folder
    from sae_lens_matryoshka.runs.dry_run import go_offline
    from sae_lens_matryoshka.saebench.records import Record
    from sae_lens_matryoshka.saebench.suite import check_request, plan_suite

    without_sae = ("evaluations", "n_seeds", "settings", "model_name", "device")
    check_request(out, **{name: options[name] for name in without_sae})
    go_offline()
    for source in [*saes, *against]:
        if len(source) == 2:
            repo_id, folder = repo_and_folder(*source)
            print(f"{':'.join(source)}: {folder} of {repo_id}, not downloaded")
        elif not Path(source[0]).is_dir():
            print(f"{source[0]}: not there yet")
    for evaluation in options["evaluations"]:
        if (need := unmet_need(evaluation)) is not None:
            print(f"{evaluation} {need}")
    Record.read(out)
    saes, against = (
        [source for source in sources if len(source) == 1 and Path(source[0]).is_dir()]
        for sources in (saes, against)
    )
    if saes or against:
        try:
            plan = plan_suite(saes, out, against=against, **options)
        except OSError as error:
            print(f"Not checked: {error}")
        else:
            for candidate in plan.candidates:
                print(f"{candidate.title}: {plan.record.hook_names[candidate.label]}, found")
    seeds = f"{options['n_seeds']} seed{'s' if options['n_seeds'] > 1 else ''}"
    print(f"Would run {', '.join(options['evaluations'])} with {seeds}, into {out}.")
    return 0


def _source(text: str) -> list[str]:
    """What `load_sae` takes: a folder, or a release and an SAE's id."""
    release, colon, sae_id = text.partition(":")
    return [release, sae_id] if colon and not Path(text).exists() else [text]


def _levels(text: str) -> list[int] | None:
    """The type of --levels; None is all."""
    if text == "all":
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give all, or numbers from 1 on such as 1,3"
        ) from None


def _settings(words: list[str]) -> dict[str, dict[str, Any]]:
    """`--evaluation.field value …` as evaluation → field → value; values are read as YAML."""
    import yaml

    settings: dict[str, dict[str, Any]] = {}
    pairs = iter(words)
    for flag in pairs:
        name, equals, value = flag.removeprefix("--").partition("=")
        evaluation, dot, field = name.partition(".")
        if not flag.startswith("--") or not dot:
            raise ValueError(
                f"{flag!r} is not an option: see --help; --EVALUATION.FIELD VALUE sets a field of "
                "SAEBench's configs."
            )
        if not equals:
            value = next(pairs, None)
            if value is None:
                raise ValueError(f"{flag} needs a value.")
        try:
            settings.setdefault(evaluation, {})[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag}={value!r} can't be read: give YAML.") from error
    return settings
