"""`sae-matryoshka steer`: what a model writes with some latents changed."""

import argparse
import shutil
import textwrap
from itertools import zip_longest
from typing import Any

from sae_lens_matryoshka.cli.options import add_device, add_widths, positive_integer

_GAP, _LEAST_COLUMN = 3, 22


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "steer",
        help="generate text with latents changed",
        description="Generate text as the model is, with latents changed, and with random latents "
        "of the same levels changed as much: docs/steering.md.",
    )
    add = parser.add_argument
    add("release_or_dir", help="a folder, or a release or repository and SAE_ID")
    add("sae_id", nargs="?", help="its id in the release or repository")
    add(
        "--latent",
        type=_latent,
        action="append",
        required=True,
        metavar="N=VALUE",
        help="a latent and its value, such as 23=4, or for ablate 23; may be repeated",
    )
    add("--prompt", required=True, help="the beginning of the text")
    add(
        "--mode",
        choices=["add", "set", "scale", "ablate"],
        default="add",
        help="what the value does to the activation (default: %(default)s)",
    )
    add(
        "--max-new-tokens",
        type=positive_integer,
        default=40,
        metavar="N",
        help="how many tokens to generate, at most (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the sampling and the control (default: 0)")
    add("--model", help="the model's name, if the SAE's config has none")
    add_widths(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    numbers = [latent for latent, _ in args.latent]
    for latent, value in args.latent:
        if numbers.count(latent) > 1:
            raise ValueError(f"--latent names latent {latent} twice: give one value.")
        if (value is None) != (args.mode == "ablate"):
            wanted = f"{latent}" if args.mode == "ablate" else f"{latent}=4"
            raise ValueError(f"--mode={args.mode} takes --latent {wanted}.")

    from sae_lens_matryoshka.cli.measuring import load_given, load_model_of
    from sae_lens_matryoshka.steering import compare
    from sae_lens_matryoshka.steering.changes import checked_changes
    from sae_lens_matryoshka.util.devices import check_device

    check_device("--device", args.device)
    sae = load_given(args)
    latents = numbers if args.mode == "ablate" else dict(args.latent)
    checked_changes(sae, latents, args.mode)
    model = load_model_of(sae, args)
    texts = compare(
        model,
        sae,
        args.prompt,
        latents,
        args.mode,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    changed = ", ".join(str(n) if v is None else f"{n}={v:g}" for n, v in args.latent)
    control = ", ".join(map(str, texts.control_latents))
    titles = ("unsteered", f"steered: {args.mode} {changed}", f"control: {control} instead")
    print(f"{args.prompt} …\n")
    written = (texts.unsteered, texts.steered, texts.control)
    print(side_by_side(titles, written, shutil.get_terminal_size().columns))
    return 0


def side_by_side(titles: tuple[str, ...], texts: tuple[str, ...], width: int) -> str:
    """Texts as columns under their titles."""
    n = len(texts)
    column = max(_LEAST_COLUMN, (width - _GAP * (n - 1)) // n)

    def wrapped(text: str) -> list[str]:
        parts = text.strip().splitlines()
        return [line for part in parts for line in textwrap.wrap(part, column) or [""]]

    heads = [wrapped(title) for title in titles]
    rows = [*zip_longest(*heads, fillvalue=""), ("-" * column,) * n]
    rows += zip_longest(*map(wrapped, texts), fillvalue="")
    gap = " " * _GAP
    return "\n".join(gap.join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def _latent(text: str) -> tuple[int, float | None]:
    number, equals, value = text.partition("=")
    try:
        return int(number), float(value) if equals else None
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give a latent and a value, such as 23=4"
        ) from None
