"""Write the SAE that comes with the package: in float16, with its model card.

    python -m examples.smollm2.ship matryoshka-k_24-n_steps_8800-seed_0

The argument names a folder in smollm2/experiment/saes, which `run.py` fills. The card's figures are
those of the written file, on held-out activations.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sae_lens import SAE

from examples.smollm2.run import N_HELD_OUT, cached_name
from sae_lens_matryoshka import cli
from sae_lens_matryoshka.demo.real_text import SAE_FOLDER
from sae_lens_matryoshka.hub.load import SHIPPED
from sae_lens_matryoshka.util.files import atomic_folder

REPO_ID = "sae-lens-matryoshka/smollm2-135m-instruct"  # in the card; nothing is uploaded


def main(argv: Sequence[str] | None = None) -> int:
    """Write the SAE.

    Returns:
        The exit code: 0; 2 if there is no such SAE; else that of `publish`.
    """
    parser = argparse.ArgumentParser(description="Write the SAE that comes with the package.")
    parser.add_argument("name", help="of the SAE")
    parser.add_argument("--experiment", type=Path, default=Path("smollm2/experiment"))
    args = parser.parse_args(argv)
    trained = args.experiment / "saes" / args.name
    if not trained.is_dir():
        print(f"error: {trained} is not a folder.", file=sys.stderr)
        return 2
    sae = SAE.load_from_disk(trained, dtype="float16")
    layer = sae.cfg.metadata.hook_name.rpartition(".")[2]
    held_out = args.experiment / cached_name("held_out", int(layer), N_HELD_OUT)
    with tempfile.TemporaryDirectory() as temporary:
        halved, published = Path(temporary, "halved"), Path(temporary, "published")
        sae.save_model(halved)
        measured = ["--activations", str(held_out)]
        folders = ["--sae-id", "sae", "--out", str(published)]
        if code := cli.main(["publish", str(halved), REPO_ID, "--dry-run", *folders, *measured]):
            return code
        card = (published / "README.md").read_text()
        with atomic_folder(SAE_FOLDER) as unfinished:
            for file in (published / "sae").iterdir():
                (unfinished / file.name).write_bytes(file.read_bytes())
            (unfinished / "README.md").write_text(_loaded_from_disk(card, held_out.name))
    return 0


def _loaded_from_disk(card: str, held_out: str) -> str:
    """The card of a folder, not of a repository of the Hub, and for readers without its data."""
    imported = "from sae_lens_matryoshka.demo.real_text import SAE_FOLDER"
    for old, new in (
        ("from sae_lens import SAE\n", f"from sae_lens import SAE\n{imported}\n"),
        (f'SAE.from_pretrained("{REPO_ID}", "sae")', "SAE.load_from_disk(SAE_FOLDER)"),
        (f'load_sae("{REPO_ID}", "sae")', f'load_sae("{SHIPPED}")'),
        ("datasets:\n- texts/train\n", ""),  # a name that the Hub would link
        ("texts/train", "the training texts of `make smollm2`"),
        (held_out, "held-out documents of the same sources"),
    ):
        card = card.replace(old, new)
    return card


if __name__ == "__main__":
    sys.exit(main())
