"""`sae-matryoshka levels`: what the levels of an SAE are like."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.cli.options import add_measuring


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "levels",
        help="show the levels of an SAE",
        description="Show the levels of an SAE: from its weights alone, or measured with "
        "--activations or --dataset.",
    )
    parser.add_argument("release_or_dir", help="a folder, or a release or repository and SAE_ID")
    parser.add_argument("sae_id", nargs="?", help="its id in the release or repository")
    add_measuring(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw L0 and variance explained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--diagnose", action="store_true", help="say what looks wrong with the SAE, and what to try"
    )
    parser.add_argument(
        "--baseline-explained-variance",
        type=float,
        metavar="SHARE",
        help="of a BatchTopK SAE of the same width and k, to compare with, such as 0.78",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="the folder of such an SAE, to measure as well"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)

    from sae_lens_matryoshka.cli.measuring import check_measuring, measure, measured_on
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
    sae = load_sae(
        args.release_or_dir,
        args.sae_id,
        matryoshka_widths=args.matryoshka_widths,
        device=args.device,
    )
    if args.baseline:  # first, since the folder may hold no SAE
        other = load_sae(str(args.baseline), device=args.device)
        set_widths(other, [other.cfg.d_sae])  # it is measured whole
        baseline = measure(other, args)[-1].explained_variance
    codes = CodeStats()
    rows = measure(sae, args, codes)
    name = " ".join(filter(None, (args.release_or_dir, args.sae_id)))
    report = {
        "sae": name,
        "measured_on": measured_on(args),
        "levels": [row._asdict() for row in rows],
    }
    print(f"{level_table(rows)}\n\n{level_note(rows, measured_on(args))}")
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
    if args.diagnose and not is_measured:
        raise ValueError("--diagnose needs measurements: give --activations or --dataset as well.")
    if args.plot and not is_measured:
        raise ValueError(
            "--plot draws L0 and variance explained, which are measured: give --activations or "
            "--dataset as well."
        )
    share, folder = args.baseline_explained_variance, args.baseline
    if not args.diagnose and (share is not None or folder):
        raise ValueError("a baseline is for --diagnose: give that as well.")
    if share is not None and folder:
        raise ValueError("--baseline and --baseline-explained-variance say the same: give one.")
    if folder and not folder.is_dir():
        raise ValueError(f"--baseline={str(folder)!r} is not a folder.")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot={str(args.plot)!r} is not accepted: give a .png, .pdf or .svg.")
    for file in filter(None, (args.plot, args.json)):
        if not file.parent.is_dir():
            raise ValueError(f"{file.parent} is not a folder to write {file.name} to.")
