"""The demo: an SAE of a real language model, then Matryoshka against BatchTopK on a tiny one.

Only the download of the real one needs a network; without it the demo begins with the tiny one.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sae_lens_matryoshka.demo.stages import START, stage

# TransformerLens knows it once the package is imported; transformers prefers a folder of that name.
MODEL_NAME = "sae-lens-matryoshka/tiny-gpt-neox"
# SAEBench knows data sets by name, and reads the columns `text` and `label` of this one.
LABELLED_FOLDER = Path("fancyzhx") / "ag_news"
N_TEXTS, N_HELD_OUT = 24_000, 2_000
N_LABELLED = 4_000  # documents in each split
# Added to the run's seed, so that none of these texts was trained on
HELD_OUT_SEED = 10_000
LABELLED_SEEDS = {"train": 20_000, "test": 30_000}
_MARKER = "demo.txt"


def run_demo(out: Path, seed: int = 0) -> int:
    """Show the SAE that comes with the package; train `matryoshka` and SAELens' `batchtopk`.

    Writes to `out` both SAEs (`matryoshka/`, `batchtopk/`, as SAELens saves them), `results.json`,
    `results.md`, `levels.png` and `summary.txt`, beside their model and the texts. If SAEBench is
    installed, `saebench/` has its results on both SAEs and every level. If SmolLM2-135M-Instruct
    can be downloaded, `smollm2_levels.png` shows the levels of the SAE that comes with the package.
    `page/index.html` shows which latents specialise which: of that SAE, or else of `matryoshka`.

    Args:
        out: Output folder, made if missing. An earlier demo in it is replaced.
        seed: Seed of the texts, the weights and the order of the activations.

    Returns:
        The exit code of the training process.

    Raises:
        ValueError: `out` holds something other than a demo.
    """
    start = time.time()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists())):
        raise ValueError(
            f"out={str(out)!r} holds something other than a demo: give a new or an empty folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text(
        f"Made by `sae-matryoshka demo`. {MODEL_NAME} is a language model that comes with the "
        "package. All texts are generated; those under fancyzhx/ have the format of AG News, which "
        "SAEBench knows.\n"
    )
    # The Hub's clients read these when they are imported: training needs a process of its own.
    environment = {
        **os.environ,
        START: str(start),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str((out / ".cache").resolve()),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
    stage("Importing libraries; the whole demo takes about five minutes on two cores")
    command = [sys.executable, "-m", "sae_lens_matryoshka.demo.compare", str(seed)]
    return subprocess.run(command, cwd=out, env=environment, check=False).returncode


def write_model_and_texts(out: Path, seed: int) -> None:
    """Write the demo's model and texts for processes that run in `out`."""
    from datasets import Dataset  # takes a second to import

    from sae_lens_matryoshka.demo.corpus import labelled_documents, texts

    shutil.copytree(Path(__file__).with_name("model"), out / MODEL_NAME, dirs_exist_ok=True)
    columns = {
        Path("corpus", "train"): {"text": texts(N_TEXTS, seed)},
        Path("held_out", "train"): {"text": texts(N_HELD_OUT, seed + HELD_OUT_SEED)},
        **{
            LABELLED_FOLDER / split: labelled_documents(N_LABELLED, seed + offset)
            for split, offset in LABELLED_SEEDS.items()
        },
    }
    for path, dataset in columns.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(dataset).to_parquet(out / f"{path}.parquet")
