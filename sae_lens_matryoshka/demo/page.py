"""Which latents of an SAE specialise which, as a page and in a few lines."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from sae_lens import SAE

from sae_lens_matryoshka.tree import Tree, build_tree
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.page.tokens import TokenTexts
from sae_lens_matryoshka.tree.report import words_of

_N_LINES = 4
_QUOTED = re.compile(r"""['"](.*?)['"]""")
_LETTERS = re.compile(r"[^\W\d_]{3}")


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
        A parent and a child of its own in each line, such that both fire on words.
    """
    shutil.rmtree(folder, ignore_errors=True)
    gathered = folder / "gathered"
    tree = build_tree(sae, model, dataset, n_tokens, folder=gathered)
    tree.save(folder / "tree.json")
    read = Gathered(gathered)
    examples = find_examples(read)
    write_page(folder, tree, read, examples, sae, model, name)
    words = words_of(read, examples, TokenTexts(model.tokenizer))
    return _lines(tree, words)


def _lines(tree: Tree, words_of_latent: Callable[[int], str]) -> list[str]:
    """The edges with the highest lift between latents of different words, one for each parent."""
    drawn = tree.edges[tree.edges["strongest"]].sort_values("lift", ascending=False)
    lines: dict[int, str] = {}
    for edge in drawn.to_dict("records"):
        parent, child = edge["parent"], edge["child"]
        texts = [words_of_latent(latent) for latent in (parent, child)]
        general, special = ({w.strip().lower() for w in _QUOTED.findall(text)} for text in texts)
        if parent in lines or general & special or not all(map(_LETTERS.search, general | special)):
            continue
        density = tree.latents.loc[parent, "density"]
        lines[parent] = (
            f"latent {child}{texts[1]}: latent {parent}{texts[0]} fires on {edge['coverage']:.0%} "
            f"of its tokens, and on {density:.1%} of all"
        )
        if len(lines) == _N_LINES:
            break
    return list(lines.values())
