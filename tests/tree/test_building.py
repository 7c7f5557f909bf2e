"""Trees of small worlds in which the true edges are known."""

import networkx as nx
import numpy as np
import pytest
import torch

from sae_lens_matryoshka.tree import Tree, build_tree
from tests.tree.worlds import (
    ALONE,
    CHILD,
    D_IN,
    DEAD,
    DENSE,
    GRANDCHILD,
    PARENT,
    TOPIC_A,
    TOPIC_B,
    WIDTHS,
    exact_sae,
    small_firings,
    small_world,
)

N_TOKENS = 20_000
TRUE = {(PARENT, CHILD), (PARENT, GRANDCHILD), (CHILD, GRANDCHILD)}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return build_tree(exact_sae(8), activations=small_world(N_TOKENS))


def passed(tree: Tree) -> set[tuple[int, int]]:
    edges = tree.edges[tree.edges["passed"]]
    return set(zip(edges["parent"], edges["child"], strict=True))


def test_the_true_edges_pass_and_no_others(tree):
    assert passed(tree) == TRUE
    assert tree.summary["n_passed"] == 3
    assert tree.summary["n_shifted_passed"] == 0
    assert tree.summary["n_dead"] == 1
    # seven latents fire often enough, and of two the more frequent is the parent
    assert tree.summary["n_looked_at"] == 21


def test_coverage_alone_takes_chance_and_topics_for_edges():
    plain = build_tree(exact_sae(8), activations=small_world(N_TOKENS), edges="coverage")
    assert passed(plain) > TRUE
    assert (DENSE, ALONE) in passed(plain)
    assert (TOPIC_A, TOPIC_B) in passed(plain)
    assert plain.summary["n_shifted_passed"] > 0


def test_families(tree):
    assert tree.roots() == [PARENT]
    assert tree.children(PARENT) == [CHILD, GRANDCHILD]
    assert tree.parents(GRANDCHILD) == [CHILD, PARENT]
    assert tree.siblings(GRANDCHILD) == []
    assert tree.parents(DEAD) == []
    assert tree.latents.loc[GRANDCHILD, "parent"] == CHILD
    assert tree.latents.loc[PARENT, "n_children"] == 2
    direct = tree.edges[tree.edges["direct"]]
    assert set(zip(direct["parent"], direct["child"], strict=True)) == {
        (PARENT, CHILD),
        (CHILD, GRANDCHILD),
    }
    with pytest.raises(ValueError, match="latent=8 is not accepted: give 0 to 7"):
        tree.children(8)
    with pytest.raises(ValueError, match="latent 0 as the parent of 7 was not tested"):
        tree.edge(PARENT, DEAD)


def test_evidence_is_that_of_the_firings(tree):
    fires = small_firings(N_TOKENS).numpy()
    edge = tree.edge(PARENT, CHILD)
    n, m, both = fires[:, 0].sum(), fires[:, 1].sum(), (fires[:, 0] & fires[:, 1]).sum()
    assert edge["n_both"] == both
    assert edge["coverage"] == both / m == 1
    assert edge["lift"] == pytest.approx(N_TOKENS / n)
    assert edge["of_parent"] == pytest.approx(both / n)
    assert edge["n_expected"] == pytest.approx(n * m / N_TOKENS)
    assert edge["direction_rank"] == 1
    assert edge["presence"] == pytest.approx(1, abs=0.02)
    assert edge["nearby"] == pytest.approx((n - m) / (N_TOKENS - m), abs=0.02)
    topic = tree.edge(TOPIC_A, TOPIC_B)
    assert topic["coverage"] == pytest.approx(0.8, abs=0.05)
    assert topic["nearby"] == pytest.approx(0.8, abs=0.05)
    assert topic["lift"] > 8
    assert tree.latents["n_fired"].tolist() == fires.sum(0).tolist()
    assert tree.latents.loc[DEAD, ["mean_activation", "max_activation"]].tolist() == [0, 0]


def test_parents_are_of_inner_levels(tree):
    nested = build_tree(exact_sae(8, WIDTHS), activations=small_world(N_TOKENS))
    assert nested.latents["level"].tolist() == [0, 1, 1, 1, 1, 2, 2, 2]
    assert passed(nested) == {(PARENT, CHILD), (PARENT, GRANDCHILD)}
    assert nested.settings["rules"]["parents_by_level"]
    assert not tree.settings["rules"]["parents_by_level"]


def test_saved_and_loaded_it_is_the_same(tree, tmp_path):
    tree.save(tmp_path / "tree.json")
    loaded = Tree.load(tmp_path / "tree.json")
    for name in ("latents", "edges"):
        saved, read = getattr(tree, name), getattr(loaded, name)
        assert list(saved.columns) == list(read.columns)
        for column in saved:
            np.testing.assert_allclose(saved[column], read[column], rtol=1e-5)
    assert loaded.summary == tree.summary
    assert loaded.settings == tree.settings
    assert loaded.children(PARENT) == tree.children(PARENT)


def test_networkx_and_graphml(tree, tmp_path):
    graph = tree.to_networkx()
    assert set(graph.edges) == TRUE
    assert set(graph.nodes) == set(range(8))
    assert graph.edges[PARENT, CHILD]["coverage"] == 1
    assert graph.nodes[PARENT]["n_fired"] == tree.latents.loc[PARENT, "n_fired"]
    nx.write_graphml(graph, tmp_path / "tree.graphml")
    read = nx.read_graphml(tmp_path / "tree.graphml", node_type=int)
    assert set(read.edges) == TRUE
    assert read.edges[PARENT, CHILD]["coverage"] == 1


@pytest.mark.parametrize("broken", ["", "{}", '{"format_version": 2}', "[1]"])
def test_a_broken_file(broken, tmp_path):
    (tmp_path / "tree.json").write_text(broken)
    with pytest.raises(ValueError, match=r"tree\.json can't be read"):
        Tree.load(tmp_path / "tree.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": torch.zeros(600, D_IN + 1)}, "of width 13, and this SAE takes d_in=12"),
        ({"activations": torch.zeros(600, D_IN)}, "no latent fires on these 600 tokens"),
        ({"activations": small_world(100)}, "100 tokens are too few for a tree: .*about 512 tok"),
        ({"activations": torch.zeros(600, D_IN), "dataset": "x"}, "activations exclude"),
        ({}, "give activations, or a model and a dataset"),
        ({"edges": "all"}, "edges='all' is not accepted: give 'tested' or 'coverage'"),
        ({"min_coverage": 2}, "min_coverage=2 is not accepted: give 0 to 1"),
        ({"n_tokens": 0}, "n_tokens=0 is not accepted"),
        ({"model": object(), "dataset": "x"}, "metadata of this SAE has no hook_name"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        build_tree(exact_sae(8), **options)


def test_a_random_sae_has_no_tree():
    """At most 5 % of the pairs that are tested pass where there is nothing to find."""
    generator = torch.Generator().manual_seed(0)
    sae = exact_sae(64)
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            weights = getattr(sae, name)
            weights.copy_(torch.randn(weights.shape, generator=generator) / 2)
    x = torch.randn(N_TOKENS, D_IN, generator=generator)
    tree = build_tree(sae, activations=x)
    assert tree.summary["n_tested"] > 20
    assert tree.summary["n_passed"] <= 0.05 * tree.summary["n_tested"]
    assert tree.summary["n_shifted_passed"] == 0
