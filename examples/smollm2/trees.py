"""How many latents of an SAE specialise which, by the tests of docs/tree.md."""

import tempfile
from pathlib import Path

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import set_widths
from sae_lens_matryoshka.tree.building import levels_of, tree_of, widths_or_all
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.sources import StoredActivations


def count_edges(folder: Path, activations: Path) -> dict[str, dict[str, int]]:
    """The edges of an SAE's tree, counted: rule for a parent → name → number.

    Args:
        folder: Of the SAE.
        activations: In the order of the texts.

    Returns:
        For "frequency", where a parent is any more frequent latent, as in an SAE without levels,
        and, if it has levels, for "level": the tree's summary and
            n_children: latents with a parent,
            n_parents: latents with a child,
            n_families: latents without a parent and with at least two children,
            n_covered: pairs whose coverage is at least 0.9, whether or not they passed.
    """
    sae = load_sae(folder, dtype="float32")
    source = StoredActivations(str(activations), sae)
    rules = {"frequency": [sae.cfg.d_sae]}
    if levels_of(sae)[1]:
        rules["level"] = widths_or_all(sae)
    counts: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        gathered = gather(sae, source, Path(temporary), source.n_rows)
        for rule, widths in rules.items():
            set_widths(sae, widths)
            tree = tree_of(gathered, sae)
            latents = tree.latents
            is_root = latents["parent"] < 0
            counts[rule] = dict(tree.summary) | {
                "n_children": int((~is_root).sum()),
                "n_parents": int((latents["n_children"] > 0).sum()),
                "n_families": int((is_root & (latents["n_children"] >= 2)).sum()),
                "n_covered": int((tree.edges["coverage"] >= 0.9).sum()),
            }
    return counts
