"""The demo: a small language model, BatchTopK against Matryoshka, offline, in a few minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from datasets import Dataset

from sae_lens_matryoshka.demo.corpus import labelled_documents, texts

# TransformerLens loads official names only; transformers takes a folder of that name first.
MODEL_FOLDER = Path("EleutherAI") / "pythia-70m-deduped"
# SAEBench knows data sets by name, and this shape by this one.
LABELLED_FOLDER = Path("fancyzhx") / "ag_news"
N_TEXTS, N_HELD_OUT = 24_000, 2_000
HELD_OUT_SEED = 10_000  # added to the run's seed, for texts that no SAE was trained on
LABELLED_SEEDS = {"train": 20_000, "test": 30_000}  # as well
N_LABELLED = 4_000  # documents in each split
_MARKER = "demo.txt"


def run_demo(out: Path, seed: int = 0) -> int:
    """Train SAELens' `batchtopk` and our `matryoshka` on the demo model and compare them.

    Leaves in `out` both SAEs (`batchtopk/`, `matryoshka/`, as SAELens saves them), `results.json`,
    `results.md`, `levels.png` and `nesting.md`, beside the model and the texts that they were
    trained on, and where SAEBench is installed, its results on both and every level in `saebench/`.

    Args:
        out: Folder for everything, made if missing; a demo that is there is run anew.
        seed: Of the texts, the weights and the order of the activations.

    Returns:
        The exit code of the process that trains.

    Raises:
        ValueError: `out` holds something other than a demo.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists())):
        raise ValueError(
            f"out={str(out)!r} holds something other than a demo: give a new or an empty folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text(
        "Made by `sae-matryoshka demo`. The model under EleutherAI/ is this package's demo model: "
        "it only takes the name pythia-70m-deduped, because TransformerLens knows that one. The "
        "texts under fancyzhx/ are made by the package too, in the shape of AG News, which "
        "SAEBench knows.\n"
    )
    write_model_and_texts(out, seed)
    # The Hub's clients read these when they are imported, so training has a process of its own.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str((out / ".cache").resolve()),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
    return subprocess.run(
        [sys.executable, "-m", "sae_lens_matryoshka.demo.compare", str(seed)],
        cwd=out,
        env=environment,
        check=False,
    ).returncode


def write_model_and_texts(out: Path, seed: int) -> None:
    """Put the demo's model, and the texts to train and to evaluate on, where `out` is the cwd."""
    shutil.copytree(Path(__file__).with_name("model"), out / MODEL_FOLDER, dirs_exist_ok=True)
    for name, n, offset in (("corpus", N_TEXTS, 0), ("held_out", N_HELD_OUT, HELD_OUT_SEED)):
        (out / name).mkdir(exist_ok=True)
        rows = Dataset.from_dict({"text": texts(n, seed + offset)})
        rows.to_parquet(out / name / "train.parquet")
    (out / LABELLED_FOLDER).mkdir(parents=True, exist_ok=True)
    for split, offset in LABELLED_SEEDS.items():
        rows = Dataset.from_dict(labelled_documents(N_LABELLED, seed + offset))
        rows.to_parquet(out / LABELLED_FOLDER / f"{split}.parquet")
