"""`sae-matryoshka levels`: a table, a plot and a diagnosis of the levels of an SAE."""

import argparse
import json
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.cli.options import add_measuring
from sae_lens_matryoshka.util.checks import invalid_option


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "levels",
        help="show the levels of an SAE",
        description="Show the levels of an SAE: from its weights alone, or measured with "
        "--activations or --dataset.",
    )
    add = parser.add_argument
    add("release_or_dir", help="a folder, or a release or repository and SAE_ID")
    add("sae_id", nargs="?", help="its id in the release or repository")
    add_measuring(parser)
    add("--plot", type=Path, metavar="FILE", help="plot L0 and variance explained")
    add("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    add("--diagnose", action="store_true", help="say what looks wrong, and what to try")
    add(
        "--baseline-explained-variance",
        type=float,
        metavar="SHARE",
        help="of a BatchTopK SAE of the same width and k, to compare with, such as 0.78",
    )
    add("--baseline", type=Path, metavar="DIR", help="such an SAE, to measure as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)

    from sae_lens_matryoshka.cli.measuring import (
        MEASURED_DTYPE,
        check_measuring,
        load_given,
        measure,
        measured_on,
    )
    from sae_lens_matryoshka.hub.load import load_sae
    from sae_lens_matryoshka.levels.report import draw_level_stats, level_note, level_table
    from sae_lens_matryoshka.levels.slicing import set_widths
    from sae_lens_matryoshka.levels.stats import measured_of
    from sae_lens_matryoshka.training.code_stats import CodeStats
    from sae_lens_matryoshka.training.diagnosis import check_baseline, diagnose
    from sae_lens_matryoshka.util.files import atomic_file

    check_measuring(args)
    baseline = args.baseline_explained_variance
    if baseline is not None:
        check_baseline("--baseline-explained-variance", baseline)
    sae = load_given(args)
    if args.baseline:  # first, since the folder may hold no SAE
        other = load_sae(args.baseline, device=args.device, dtype=MEASURED_DTYPE)
        set_widths(other, [other.cfg.d_sae])  # it is measured whole
        baseline = measure(other, args)[-1].explained_variance
    codes = CodeStats()
    rows = measure(sae, args, codes)
    name = " ".join(filter(None, (args.release_or_dir, args.sae_id)))
    data = measured_on(args)
    report = {"sae": name, "measured_on": data, "levels": [row._asdict() for row in rows]}
    print(f"{level_table(rows)}\n\n{level_note(rows, data)}")
    if args.diagnose:
        findings = diagnose(measured_of(sae, rows, codes, baseline))
        report["findings"] = [finding._asdict() for finding in findings]
        lines = [f"- {finding.kind}: {finding.message}" for finding in findings]
        print("\n" + ("\n".join(lines) or "Nothing stands out."))
    if args.json:
        with atomic_file(args.json) as unfinished:
            unfinished.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        draw_level_stats(args.plot, rows, title=name)
    return 0


def _check(args: argparse.Namespace) -> None:
    is_measured = args.activations or args.dataset
    for flag, given in (("--diagnose", args.diagnose), ("--plot", args.plot)):
        if given and not is_measured:
            raise ValueError(f"{flag} needs measurements: give --activations or --dataset as well.")
    share, folder = args.baseline_explained_variance, args.baseline
    if not args.diagnose and (share is not None or folder):
        raise ValueError("a baseline is for --diagnose: give that as well.")
    if share is not None and folder:
        raise ValueError(
            "--baseline and --baseline-explained-variance exclude each other: give one."
        )
    if folder and not folder.is_dir():
        raise ValueError(f"--baseline={str(folder)!r} is not a folder.")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise invalid_option("--plot", str(args.plot), "a .png, .pdf or .svg file")
    for file in filter(None, (args.plot, args.json)):
        if not file.parent.is_dir():
            raise ValueError(f"{file.parent} is not a folder to write {file.name} to.")
