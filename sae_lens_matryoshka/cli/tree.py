"""`sae-matryoshka tree`: which latents of an SAE specialise which."""

import argparse
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import Any

from sae_lens_matryoshka.cli.options import add_data, exit_on_sigterm, positive_integer
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.files import check_writable


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tree",
        help="find which latents specialise which",
        description="Find which latents of an SAE specialise which, and test it: docs/tree.md. An "
        "interrupted command resumes.",
    )
    add = parser.add_argument
    add("release_or_dir", help="a folder, or a release or repository and SAE_ID")
    add("sae_id", nargs="?", help="its id in the release or repository")
    add_data(parser)
    add(
        "--out",
        type=Path,
        default=Path("page"),
        metavar="FOLDER",
        help="where the tree goes (default: %(default)s)",
    )
    add(
        "--tokens",
        type=positive_integer,
        default=1_000_000,
        metavar="N",
        help="how many to look at, at most (default: %(default)s)",
    )
    add(
        "--edges",
        choices=["tested", "coverage"],
        default="tested",
        help="coverage: only P(parent | child), without the other tests (default: %(default)s)",
    )
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="labels of latents: a JSON file that the page exported, or of SAEBench's autointerp; "
        "labels.json in --out is read too",
    )
    add(
        "--ablation",
        action="store_true",
        help="estimate how the model's loss changes without each latent, which takes about three "
        "times the whole model's pass over the texts",
    )
    add("--single-file", action="store_true", help="write the page as one file, for a small SAE")
    add(
        "--serve",
        action="store_true",
        help="then serve the page with its model, on this machine alone; without --dataset or "
        "--activations, the page that --out has",
    )
    add(
        "--port",
        type=positive_integer,
        default=8000,
        metavar="N",
        help="where to serve (default: %(default)s)",
    )
    add(
        "--export",
        nargs=2,
        metavar=("neuronpedia", "OUT"),
        help="write what Neuronpedia imports into the folder OUT, too",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    has_data = bool(args.activations or args.dataset)
    if not has_data and not args.serve:
        raise ValueError("a tree needs activations: give --activations or --dataset.")
    if args.ablation and not args.dataset:
        raise ValueError("--ablation needs the model and its texts: give --dataset.")
    if args.serve and args.single_file:
        raise ValueError("--serve needs the page as a folder: leave --single-file out.")
    if args.labels and not has_data:
        raise ValueError("--labels go into a page that is written: give --dataset.")
    if args.export:
        kind, folder = args.export
        check_export_options(kind, folder, args.dataset)
    out: Path = args.out
    others = {file.name for file in out.iterdir()} - {"labels.json"} if out.is_dir() else set()
    if others and not (out / "gathered").is_dir():  # which a tree begins with
        raise ValueError(f"{out} holds something else: give --out a new or an empty folder.")

    from sae_lens_matryoshka.cli.measuring import (
        check_measuring,
        load_given,
        load_model_of,
        open_given,
    )
    from sae_lens_matryoshka.levels.fingerprint import fingerprint
    from sae_lens_matryoshka.tree import build_tree
    from sae_lens_matryoshka.tree.ablation import ablation_of, check_ablation
    from sae_lens_matryoshka.tree.examples import find_examples
    from sae_lens_matryoshka.tree.gathered import Gathered
    from sae_lens_matryoshka.tree.neuronpedia import check_export, export_neuronpedia
    from sae_lens_matryoshka.tree.page import write_page
    from sae_lens_matryoshka.tree.page.corpus import Corpus, words_of_latents
    from sae_lens_matryoshka.tree.page.labels import read_labels
    from sae_lens_matryoshka.tree.page.tokens import TokenTexts
    from sae_lens_matryoshka.tree.report import family_lines, summary_lines

    check_measuring(args)
    check_writable("--out", out)
    listening = _listen(args, has_data) if args.serve else None  # before anything long begins
    sae = load_given(args)
    if listening and not has_data:
        return _serve(listening, args, sae, load_model_of(sae, args))
    labels: dict[int, str] = {}
    beside = out / "labels.json"
    for file in filter(None, (args.labels, beside if beside.exists() else None)):
        labels |= read_labels(file, sae.cfg.d_sae, fingerprint(sae))
    if args.ablation:
        check_ablation(sae)
    if args.export:
        check_export(sae)
    data: dict[str, Any]
    if args.activations:
        data = {"activations": open_given(args.activations, sae)}
    else:
        data = {"model": load_model_of(sae, args), "dataset": args.dataset}
        data["batch_size_prompts"] = args.batch_size_prompts
    exit_on_sigterm()
    try:
        tree = build_tree(
            sae, n_tokens=args.tokens, edges=args.edges, folder=out / "gathered", **data
        )
        gathered = Gathered(out / "gathered")
        examples = find_examples(gathered)
        ablation = ablation_of(gathered, sae, data["model"]) if args.ablation else None
    except (KeyboardInterrupt, SystemExit):
        print(f"\nStopped. The same command resumes from what is in {out}.", file=sys.stderr)
        raise
    examples.save(out / "examples.safetensors")
    tree.save(out / "tree.json")
    write_page(
        out,
        tree,
        gathered,
        examples,
        sae,
        data.get("model"),
        _name(args),
        labels=labels,
        ablation=ablation,
        single_file=args.single_file,
    )
    if args.export:
        export_neuronpedia(
            Path(args.export[1]), tree, gathered, examples, sae, data["model"], _name(args)
        )
    if not tree.settings["rules"]["parents_by_level"]:
        print("This SAE has no levels: a parent is any latent that fires more often.\n")
    print("\n".join(summary_lines(tree)))
    tokenizer = getattr(data.get("model"), "tokenizer", None)
    words = []
    if tokenizer:
        words = words_of_latents(Corpus(gathered), examples, TokenTexts(tokenizer))
    print("\n" + "\n".join(family_lines(tree, words)))
    print(f"\nOpen {out / 'index.html'}. Beside it are tree.json and more: docs/tree.md.")
    if listening:
        return _serve(listening, args, sae, data.get("model") or load_model_of(sae, args))
    return 0


def _name(args: argparse.Namespace) -> str:
    given = Path(args.release_or_dir)
    name = given.resolve().name if given.is_dir() else args.release_or_dir
    return " ".join(filter(None, [name, args.sae_id]))


def _listen(args: argparse.Namespace, has_data: bool) -> socket:
    for module in ("starlette", "uvicorn"):
        if find_spec(module) is None:
            raise ValueError(f"--serve needs {module}: pip install 'sae-lens-matryoshka[page]'.")
    from sae_lens_matryoshka.tree.live.server import check_page, listen

    if not has_data:
        check_page(args.out)
    return listen(args.port)


def _serve(listening: socket, args: argparse.Namespace, sae: Any, model: Any) -> int:
    from sae_lens_matryoshka.tree.live.server import Live, serve

    exit_on_sigterm()
    serve(Live(args.out, sae, model, _name(args)), listening)
    return 0


def check_export_options(kind: str, out: str, dataset: str | None) -> None:
    """Check --export before anything loads; ValueError if it is not accepted."""
    if kind != "neuronpedia":
        raise invalid_option("--export", kind, "neuronpedia and a folder")
    if not dataset:
        raise ValueError("--export neuronpedia needs the model and its texts: give --dataset.")
    folder = Path(out)
    check_writable("--export neuronpedia", folder)
    if folder.exists() and any(
        re.fullmatch(r"batch-\d+\.json|explanations\.jsonl", file.name) is None
        for file in folder.iterdir()
    ):
        raise ValueError(f"{out} holds something else: give --export a new or an empty folder.")
