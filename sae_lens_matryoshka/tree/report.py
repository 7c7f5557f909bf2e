"""The tree in a few lines of text."""

from collections.abc import Callable

import numpy as np

from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.tree import Tree

_N_WORDS = 4  # that name a latent


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
    tree: Tree,
    name: Callable[[int], str] = lambda latent: "",
    n_families: int = 10,
    n_children: int = 6,
) -> list[str]:
    """The latents with the most information about their children, and these.

    Args:
        tree: The tree.
        name: What to write behind a latent's number.
        n_families: How many parents.
        n_children: How many children of each, the strongest first.
    """
    drawn = tree.edges[tree.edges["strongest"]]
    strength = drawn.groupby("parent")["information"].sum().sort_values(ascending=False)
    lines = []
    for parent in strength.index[:n_families].tolist():
        children = drawn[drawn["parent"] == parent]
        density = tree.latents.loc[parent, "density"]
        title = f"latent {parent}{name(parent)}: {density:.2%} of tokens, {len(children)} children"
        lines.append(title)
        lines += [
            f"    {edge['child']}{name(edge['child'])}: coverage {edge['coverage']:.2f} "
            f"[{edge['coverage_low']:.2f}, {edge['coverage_high']:.2f}], lift {edge['lift']:.1f}, "
            f"presence {edge['presence']:.2f}"
            for edge in children[:n_children].to_dict("records")
        ]
    return lines


def words_of(
    gathered: Gathered, examples: Examples, text_of: Callable[[int], str]
) -> Callable[[int], str]:
    """Names latents by the tokens of their top examples; see `family_lines`.

    Args:
        gathered: With texts.
        examples: Of its latents.
        text_of: The text of a token id.
    """
    shards = range(len(gathered.index.shards))
    ids = np.concatenate([gathered.tokens(i).reshape(-1)[gathered.positions(i)] for i in shards])

    def name(latent: int) -> str:
        tokens = examples.top_tokens[latent]
        words = dict.fromkeys(text_of(int(ids[token])) for token in tokens[tokens >= 0])
        return f" ({' '.join(repr(word) for word in list(words)[:_N_WORDS])})"

    return name
