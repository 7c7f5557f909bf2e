"""How many latents of an SAE specialise which, by the tests of docs/tree.md."""

from pathlib import Path

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import set_widths
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.building import levels_of, tree_of
from sae_lens_matryoshka.tree.gathered import Gathered


def count_edges(folder: Path, page: Path) -> dict[str, dict[str, int]]:
    """The edges of an SAE's tree, counted: rule for a parent → name → number.

    Args:
        folder: Of the SAE.
        page: What `sae-matryoshka tree` has written about it.

    Returns:
        For "frequency", where a parent is any more frequent latent, as in an SAE without levels,
        and, if it has levels, for "level": the tree's summary and
            n_children: latents with a parent,
            n_parents: latents with a child,
            n_families: latents without a parent and with at least two children,
            n_covered: pairs whose coverage is at least 0.9, whether or not they passed.
    """
    sae = load_sae(folder, dtype="float32")
    tree = Tree.load(page / "tree.json")
    if not levels_of(sae)[1]:
        return {"frequency": _counted(tree)}
    set_widths(sae, [sae.cfg.d_sae])
    by_frequency = tree_of(Gathered(page / "gathered"), sae)
    return {"frequency": _counted(by_frequency), "level": _counted(tree)}


def _counted(tree: Tree) -> dict[str, int]:
    latents = tree.latents
    is_root = latents["parent"] < 0
    return dict(tree.summary) | {
        "n_children": int((~is_root).sum()),
        "n_parents": int((latents["n_children"] > 0).sum()),
        "n_families": int((is_root & (latents["n_children"] >= 2)).sum()),
        "n_covered": int((tree.edges["coverage"] >= 0.9).sum()),
    }
