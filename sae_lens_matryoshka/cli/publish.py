"""`sae-matryoshka publish`: an SAE, its levels and a model card on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.cli.options import add_measuring


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "publish",
        help="upload an SAE with a model card",
        description="Upload an SAE with a model card to the Hugging Face Hub, as the user of `hf "
        "auth login` or HF_TOKEN.",
    )
    parser.add_argument("release_or_dir", metavar="DIR", help="the folder of a trained SAE")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it does not exist")
    parser.add_argument("--sae-id", help="its folder in the repository (default: the hook name)")
    parser.add_argument(
        "--with-levels", action="store_true", help="also each inner level, as an SAE of its own"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--dry-run", action="store_true", help="only write the folder that would be uploaded"
    )
    parser.add_argument(
        "--out", type=Path, help="that folder (with --dry-run; default: published/REPO_ID)"
    )
    add_measuring(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.out and not args.dry_run:
        raise ValueError("--out goes with --dry-run: without it nothing is kept on disk.")

    from sae_lens_matryoshka.cli.measuring import check_measuring, measure, measured_on
    from sae_lens_matryoshka.hub.load import load_sae
    from sae_lens_matryoshka.hub.publish import check_names, publish, write_publication

    check_measuring(args)
    out = args.out or Path("published") / args.repo_id
    check_names(args.repo_id, args.sae_id, out if args.dry_run else None)
    sae = load_sae(
        args.release_or_dir, matryoshka_widths=args.matryoshka_widths, device=args.device
    )
    options: dict[str, Any] = {
        "sae": sae,
        "stats": measure(sae, args),
        "measured_on": measured_on(args),
        "with_levels": args.with_levels,
    }
    names = args.repo_id, args.sae_id
    if args.dry_run:
        write_publication(args.release_or_dir, out, *names, **options)
        print(f"{out} holds what would be uploaded to {args.repo_id}.")
    else:
        card = publish(args.release_or_dir, *names, private=args.private, **options)
        print(f"{args.repo_id} is published; its card is {card}.")
    return 0
