"""Which latents of an SAE specialise which, as a page and in a few lines."""

import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from sae_lens import SAE

from sae_lens_matryoshka.tree import build_tree
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.page.corpus import Corpus, words_of_latents
from sae_lens_matryoshka.tree.page.tokens import TokenTexts
from sae_lens_matryoshka.tree.report import family_lines


def write_demo_page(
    folder: Path, sae: SAE[Any], model: Any, dataset: Dataset | str, n_tokens: int, name: str
) -> list[str]:
    """Build the tree of an SAE and write its page, in place of an earlier demo's.

    Args:
        folder: Where to.
        sae: The SAE.
        model: Its model, as SAELens loads it.
        dataset: Texts.
        n_tokens: How many of their tokens to look at, at most.
        name: What the page calls the SAE.

    Returns:
        The families that the page has first, as lines.
    """
    shutil.rmtree(folder, ignore_errors=True)
    gathered = folder / "gathered"
    tree = build_tree(sae, model, dataset, n_tokens, folder=gathered)
    tree.save(folder / "tree.json")
    read = Gathered(gathered)
    examples = find_examples(read)
    words = words_of_latents(Corpus(read), examples, TokenTexts(model.tokenizer))
    write_page(folder, tree, read, examples, sae, model, name)
    return family_lines(tree, words, n_families=3, n_children=3)
