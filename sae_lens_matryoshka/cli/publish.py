"""`sae-matryoshka publish`: an SAE, its levels and a model card on the Hub."""

import argparse
import copy
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
    add = parser.add_argument
    add("release_or_dir", metavar="DIR", help="the folder of a trained SAE")
    add("repo_id", metavar="REPO_ID", help="owner/name; created if it does not exist")
    add("--sae-id", help="its folder in the repository (default: the hook name)")
    add("--with-levels", action="store_true", help="also each inner level, as an SAE of its own")
    add("--private", action="store_true", help="make a new repository private")
    add("--dry-run", action="store_true", help="only write the folder that would be uploaded")
    add("--out", type=Path, help="that folder (with --dry-run; default: published/REPO_ID)")
    add_measuring(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.out and not args.dry_run:
        raise ValueError("--out needs --dry-run: without it no folder is kept.")

    from sae_lens.constants import DTYPE_MAP

    from sae_lens_matryoshka.cli.measuring import (
        MEASURED_DTYPE,
        check_measuring,
        measure,
        measured_on,
    )
    from sae_lens_matryoshka.hub.load import load_sae
    from sae_lens_matryoshka.hub.publish import check_names, publish, write_publication

    check_measuring(args)
    out = args.out or Path("published") / args.repo_id
    check_names(args.repo_id, args.sae_id, out if args.dry_run else None)
    folder, widths = args.release_or_dir, args.matryoshka_widths
    sae = load_sae(folder, matryoshka_widths=widths, device=args.device)
    options: dict[str, Any] = {
        "sae": sae,
        "stats": measure(copy.deepcopy(sae).to(dtype=DTYPE_MAP[MEASURED_DTYPE]), args),
        "measured_on": measured_on(args),
        "with_levels": args.with_levels,
    }
    names = args.repo_id, args.sae_id
    if args.dry_run:
        write_publication(folder, out, *names, **options)
        print(f"{out} holds what would be uploaded to {args.repo_id}.")
    else:
        card = publish(folder, *names, private=args.private, **options)
        print(f"{args.repo_id} is published; its card is {card}.")
    return 0
