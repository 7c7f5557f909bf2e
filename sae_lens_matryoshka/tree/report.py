"""The tree in a few lines of text."""

from collections.abc import Sequence

import numpy as np

from sae_lens_matryoshka.tree.families import distinct_children, drawn_edges, variety
from sae_lens_matryoshka.tree.tree import Tree


def summary_lines(tree: Tree) -> list[str]:
    """How many pairs were looked at, tested and passed, and what a shifted copy passes."""
    s = tree.summary
    parents = (
        "of an inner level" if tree.settings["rules"]["parents_by_level"] else "any more frequent"
    )
    tested = s["n_shifted_tested"]
    return [
        f"{s['n_tokens']:,} tokens, {s['n_latents']:,} latents, of which {s['n_dead']:,} never "
        f"fire and {s['n_rare']:,} fire too rarely to be tested",
        f"{s['n_looked_at']:,} pairs of a parent ({parents}) and a rarer child; in "
        f"{s['n_tested']:,} the parent fires on at least "
        f"{tree.settings['rules']['min_coverage']:.0%} of the child's tokens; "
        f"{s['n_passed']:,} pass",
        f"of the {tested:,} such pairs in a copy whose children are shifted along the text, "
        f"{s['n_shifted_passed']:,} pass",
    ]


def family_lines(
    tree: Tree, words: Sequence[Sequence[str]] = (), n_families: int = 10, n_children: int = 5
) -> list[str]:
    """The parents with the largest variety of children, as the page has them first.

    Args:
        tree: The tree.
        words: Of each latent, `page.corpus.words_of_latents`; if they are not known, the parents
            with the most information about their children are first.
        n_families: How many parents.
        n_children: How many children of each, those with words of their own first.
    """
    drawn, is_distinct = drawn_edges(tree), distinct_children(tree, words)
    drawn = drawn.assign(is_distinct=is_distinct[drawn["child"].to_numpy(int)])
    drawn = drawn.sort_values(["is_distinct", "coverage"], ascending=False, kind="stable")

    def named(latent: int) -> str:
        level = f"(level {level_of[latent] + 1})" if has_levels else ""
        return " ".join(
            filter(None, [str(latent), level, *(map(_visible, words[latent]) if words else ())])
        )

    lines = []
    has_levels = tree.settings["rules"]["parents_by_level"]
    level_of = tree.latents["level"].tolist()
    n_all = drawn["parent"].nunique()
    parents = np.argsort(-variety(tree, is_distinct), kind="stable")[: min(n_families, n_all)]
    for parent in parents.tolist():
        children = drawn[drawn["parent"] == parent]
        density, n_passed = tree.latents.loc[parent, ["density", "n_children"]]
        number = f"{len(children)} {'child' if len(children) == 1 else 'children'}"
        if len(children) > n_children:
            number += f" ({n_children} below)"
        if n_passed > len(children):
            number += f", {n_passed - len(children):.0f} more under a stronger parent"
        lines.append(f"latent {named(parent)}: {density:.2%} of tokens, {number}")
        lines += [
            f"    {named(edge['child'])}: coverage {edge['coverage']:.2f} "
            f"[{edge['coverage_low']:.2f}, {edge['coverage_high']:.2f}], lift {edge['lift']:.1f}, "
            f"presence {edge['presence']:.2f}"
            for edge in children[:n_children].to_dict("records")
        ]
    if n_all > len(parents):
        lines.append(f"{len(parents)} of {n_all:,} families")
    return lines or ["No edge passed."]


def _visible(word: str) -> str:
    return repr(word)[1:-1].strip() or "␣"
