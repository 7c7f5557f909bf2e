"""`sae-matryoshka demo`: train on a tiny model, and show the SAE of a real one."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    text = "train and evaluate on a tiny model, then show an SAE of a real one"
    parser: argparse.ArgumentParser = commands.add_parser("demo", help=text, description=text)
    parser.add_argument("--out", type=Path, default=Path("demo_run"), help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from sae_lens_matryoshka.demo.run import run_demo

    return run_demo(args.out, args.seed)
