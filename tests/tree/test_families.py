"""Which families are read first, and what they are called in the terminal."""

import numpy as np
import pytest

from sae_lens_matryoshka.tree import Tree, build_tree
from sae_lens_matryoshka.tree.families import distinct_children, variety
from sae_lens_matryoshka.tree.report import family_lines
from tests.tree.pages import families
from tests.tree.worlds import exact_sae

N, N_PARENTS = 60, 6  # latent n from 6 on is a child of n % 6
LAST_NAMED = 36  # children from here on have no words


@pytest.fixture(scope="module")
def tree() -> Tree:
    return build_tree(exact_sae(N, [N_PARENTS, N], N), activations=families(N, N_PARENTS))


def words(tree: Tree) -> list[list[str]]:
    """Of the children of each parent: see the test."""
    of_children = [
        lambda n: [f"leaf{n}", f"root{n}", f"bark{n}"],
        lambda n: ["leaf", "root", "bark"],
        lambda n: ["Tree", f"leaf{n}", f"root{n}"],
        lambda n: [f"ab{n}", f"leaf{n}", f"root{n}"],
        lambda n: [f"叶{n}", f"根{n}", f"皮{n}", "ab"],
        lambda n: [],
    ]
    return [
        ["tree"] if n < N_PARENTS else of_children[n % N_PARENTS](n) if n < LAST_NAMED else []
        for n in range(N)
    ]


def test_children_with_words_of_their_own(tree):
    assert (tree.latents["parent"][N_PARENTS:] == np.arange(N_PARENTS, N) % N_PARENTS).all()
    is_distinct = distinct_children(tree, words(tree))
    counts = [int(is_distinct[parent::N_PARENTS].sum()) for parent in range(N_PARENTS)]
    # all differ; all have the same words; the parent's word; two letters; another script; none
    assert counts == [5, 1, 0, 0, 5, 0]
    assert not distinct_children(tree, []).any()


def test_dense_parents_have_no_variety(tree):
    is_distinct = distinct_children(tree, words(tree))
    assert (tree.latents["density"][:N_PARENTS] > 0.1).all()
    found = variety(tree, is_distinct)
    assert (found < 1).all()
    assert (found[:N_PARENTS] > 0).all()
    assert (found[N_PARENTS:] == 0).all()
    rarer = tree.latents.assign(density=tree.latents["density"] / 10)
    rarer_tree = Tree(rarer, tree.edges, tree.summary, tree.settings)
    assert variety(rarer_tree, is_distinct)[:N_PARENTS].astype(int).tolist() == [5, 1, 0, 0, 5, 0]
    lines = family_lines(rarer_tree, words(tree), n_families=2, n_children=6)
    assert len(lines) == 2 * 7 + 1
    assert {lines[0][:23], lines[7][:23]} == {"latent 0 (level 1) tree", "latent 4 (level 1) tree"}
    assert lines[14] == f"2 of {N_PARENTS} families"
    named = [line.split(":")[0].split() for line in lines if line.startswith(" ")]
    assert [len(name) > 3 for name in named] == 2 * [*5 * [True], False]
    assert [lines[i].partition("tokens, ")[2] for i in (0, 7)] == 2 * ["9 children (6 below)"]
