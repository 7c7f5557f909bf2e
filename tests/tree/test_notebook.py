"""What a notebook shows of a tree."""

from sae_lens_matryoshka.tree import build_tree
from tests.tree.worlds import CHILD, GRANDCHILD, PARENT, WIDTHS, exact_sae, small_world


def test_summary_and_families() -> None:
    tree = build_tree(exact_sae(8, WIDTHS), activations=small_world(6400))
    assert tree.children(PARENT) == [CHILD, GRANDCHILD]
    lines = tree._repr_html_().splitlines()
    assert lines[0].startswith("<pre>6,400 tokens, 8 latents")
    assert f"    {CHILD} (level 2): coverage 1.00" in "\n".join(lines)
    family = [line for line in lines if line.startswith(f"latent {PARENT} (level 1): ")]
    assert len(family) == 1
    assert lines[-1].endswith("</pre>")
