"""Which families are worth reading first: those whose children differ in their words."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from sae_lens_matryoshka.tree.tree import Tree

DENSE = 0.1  # of the tokens; few concepts are that frequent
_COMPARED = 3  # words of a child that have to be new
_THREE_LETTERS = re.compile(r"[^\W\d_]{3}")


def drawn_edges(tree: Tree) -> pd.DataFrame:
    """The edges from each child's strongest parent, those with the most information first."""
    drawn = tree.edges[tree.edges["strongest"].astype(bool)]
    return drawn.sort_values("information", ascending=False, kind="stable")


def distinct_children(tree: Tree, words: Sequence[Sequence[str]]) -> Bool[np.ndarray, " d_sae"]:
    """Whether a child has words that neither its strongest parent nor a stronger sibling has.

    Args:
        tree: The tree.
        words: Of each latent, `page.corpus.words_of_latents`; empty if they are not known. Only
            words with three letters in a row, or of a script without capitals, count.
    """
    is_distinct = np.zeros(len(tree.latents), bool)
    if not words:
        return is_distinct
    for parent, children in drawn_edges(tree).groupby("parent", sort=False)["child"]:
        seen = set(_compared(words[int(str(parent))]))
        for child in children.tolist():
            own = _compared(words[int(child)])[:_COMPARED]
            if own and all(_is_readable(word) and word not in seen for word in own):
                is_distinct[child] = True
                seen.update(own)
    return is_distinct


def variety(tree: Tree, is_distinct: Bool[np.ndarray, " d_sae"]) -> Float[np.ndarray, " d_sae"]:
    """How many distinct children each parent has, and by less than 1 the information about them.

    For dense parents the information alone.
    """
    drawn = drawn_edges(tree)
    parents, n = drawn["parent"].to_numpy(int), len(tree.latents)
    information = np.bincount(parents, drawn["information"].to_numpy(float), minlength=n)
    count = np.bincount(parents, is_distinct[drawn["child"].to_numpy(int)], minlength=n)
    count[tree.latents["density"].to_numpy() > DENSE] = 0
    return count + information / (1 + information)


def _compared(words: Sequence[str]) -> list[str]:
    return [word.strip().lower() for word in words]


def _is_readable(word: str) -> bool:
    return bool(_THREE_LETTERS.search(word)) or any(unicodedata.category(c) == "Lo" for c in word)
