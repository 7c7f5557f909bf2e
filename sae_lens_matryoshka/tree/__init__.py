"""Which latents specialise which: edges from parent to child that are tested."""

from sae_lens_matryoshka.tree.building import build_tree
from sae_lens_matryoshka.tree.tree import Tree

__all__ = ["Tree", "build_tree"]
