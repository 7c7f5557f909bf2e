"""Trees of SAEs compared with the true hierarchy."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.synthetic import models, training
from sae_lens_matryoshka.synthetic.hard import DOCUMENT, hard_model
from sae_lens_matryoshka.synthetic.hierarchy import Truth, compare
from sae_lens_matryoshka.synthetic.models import TOY, parents_of
from sae_lens_matryoshka.synthetic.tree_report import null_table, tree_table
from sae_lens_matryoshka.synthetic.trees import TreeScore, random_sae, rules_of
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.edges import direct, strongest

COUNTS = [name for name in TreeScore._fields if name.startswith("n_")]

# two trees of features: 0 → 1 → 2 → 3 and 4 → 5; feature 6 stands alone
PARENT_OF = np.array([-1, 0, 1, 2, -1, 4, -1])


def edges(*pairs: tuple[int, int]) -> pd.DataFrame:
    """Edges whose coverage is 1; the parent with the higher number is the stronger one."""
    table = pd.DataFrame(pairs, columns=["parent", "child"], dtype=int)
    table = table.assign(n_both=1, coverage=1.0, information=table["parent"] / 10, passed=True)
    table["strongest"] = strongest(table)
    table["direct"] = direct(table, 7)
    return table


def compared(*pairs: tuple[int, int], feature_of: np.ndarray | None = None) -> dict[str, Any]:
    return compare(
        edges(*pairs), Truth(np.arange(7) if feature_of is None else feature_of, PARENT_OF)
    )


def test_a_perfect_tree():
    every = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (4, 5)]
    scores = compared(*every)
    assert scores == {
        "n_edges": 7,
        "n_judged": 7,
        "precision": 1,
        "recall": 1,
        "n_parents": 4,
        "parents_found": 1,
        "direct_precision": 1,
        "direct_recall": 1,
        "strongest_precision": 1,
    }
    reversed_latents = compared(
        *((6 - parent, 6 - child) for parent, child in every), feature_of=np.arange(7)[::-1]
    )
    assert reversed_latents == {
        **scores,
        "strongest_precision": 2 / 4,
    }  # the roots are the stronger


def test_errors_of_every_kind():
    feature_of = np.array([0, 1, -1, 3, 4, 5, 6])  # feature 2 has no latent
    scores = compared((0, 1), (0, 3), (6, 5), (2, 6), (3, 4), feature_of=feature_of)
    assert scores["n_edges"] == 5
    assert scores["n_judged"] == 4  # (2, 6) is an edge of a latent without a feature
    assert scores["precision"] == 2 / 4  # (6, 5) and (3, 4) are false
    assert scores["recall"] == 2 / 4  # of (0, 1), (0, 3), (1, 3) and (4, 5)
    assert scores["n_parents"] == 2
    assert scores["parents_found"] == 1 / 2  # of (0, 1) and (4, 5)
    # the nearest ancestors are (0, 1), (1, 3) and (4, 5)
    assert scores["direct_precision"] == 1 / 4
    assert scores["direct_recall"] == 1 / 3
    assert compared()["precision"] is None
    assert compared(feature_of=np.full(7, -1))["recall"] is None


def test_a_way_around_makes_an_edge_indirect():
    scores = compared((0, 1), (1, 2), (0, 2))
    assert (scores["direct_precision"], scores["direct_recall"]) == (1, 2 / 4)
    without = compared((0, 1), (0, 2))
    assert (without["direct_precision"], without["precision"]) == (1 / 2, 1)
    # over a latent without a feature, and over three edges
    unmatched = compared((0, 1), (1, 2), (0, 2), feature_of=np.array([0, -1, 2, 3, 4, 5, 6]))
    assert (unmatched["precision"], unmatched["direct_precision"]) == (1, None)
    longer = compared((0, 1), (1, 2), (2, 3), (0, 3))
    assert (longer["direct_precision"], longer["direct_recall"]) == (1, 3 / 4)


def test_each_rule_has_its_own_direct_and_strongest_edges():
    table = edges((0, 1), (1, 2), (0, 2))
    table["coverage"] = [0.95, 0.75, 0.95]
    table["passed"] = [True, False, True]
    table["direct"] = direct(table, 7)
    tree = Tree(pd.DataFrame(index=range(7)), table, {}, {})
    rules = rules_of(tree)
    assert list(rules) == ["coverage 0.5", "coverage 0.7", "coverage 0.9", "tested"]
    assert rules["coverage 0.7"]["direct"].tolist() == [True, True, False]
    for rule in ("coverage 0.9", "tested"):
        assert rules[rule]["direct"].tolist() == [True, True]
    assert rules["coverage 0.7"]["strongest"].tolist() == [True, True, False]


def tree_score(seed: int, **values: Any) -> TreeScore:
    unknown = [None] * (len(TreeScore._fields) - 5)
    score = TreeScore._make(["a", seed, "level", "tested", 0.5, *unknown])
    return score._replace(**dict.fromkeys(COUNTS, 0) | values)


def test_the_tables_have_means_and_ranges():
    scores = [
        tree_score(
            seed,
            n_edges=n,
            precision=0.5 + 0.1 * seed,
            direct_recall=0.25 if seed else None,
            n_looked_at=1000,
            n_tested=100,
            n_shifted_tested=n,
            n_shifted_passed=1,
        )
        for seed, n in ((0, 10), (1, 20))
    ]
    table = tree_table(scores, "level", 0.5)
    assert "| a | tested | 15 (10–20) | 0 | 0.55 (0.50–0.60) |" in table
    assert "|  | 0.25 |  | 2 |" in table
    assert "| a |" not in tree_table(scores, "frequency", 0.5)
    assert "| a | level | 2,000 | 30 of 200 | 2 of 30 | 0 of 0 |" in null_table(scores)


def test_the_hard_world():
    torch.manual_seed(0)
    model = hard_model(0)
    _, acts = model.sample_with_features(DOCUMENT * 200)
    fires = (acts > 0).numpy()
    rates = fires.mean(0)
    parents = parents_of(model).numpy()
    assert ((rates[:6] > 0.27) & (rates[:6] < 0.53)).all()
    # a child fires only with its parent
    children = (parents >= 0).nonzero()[0]
    assert len(children) == 24 * (3 + 6)
    assert not (fires[:, children] & ~fires[:, parents[children]]).any()
    # correlated features without a hierarchy
    group = fires[:, 6 + 240 : 6 + 240 + 5]
    coverage = (group[:, 4] & group[:, 0]).sum() / group[:, 0].sum()
    assert 0.4 < coverage < 0.9
    # topics: in a few documents, and independent there
    topic = fires[:, 6 + 240 + 80 : 6 + 240 + 80 + 6].reshape(200, DOCUMENT, 6)
    on = topic.any((1, 2))
    assert 0.04 < on.mean() < 0.18
    a, b = topic[on][..., 5], topic[on][..., 0]
    assert a[b].mean() == pytest.approx(0.7, abs=0.06)
    assert a.mean() == pytest.approx(0.7, abs=0.03)


def test_a_random_sae_has_the_l0():
    x = torch.randn(2000, TOY.d_in, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sae = random_sae(TOY, x)
    assert (sae.encode(x) > 0).sum(1).float().mean() == pytest.approx(TOY.k, rel=0.02)


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    short = replace(TOY, n_samples=150 * 256, batch_size=256, n_scoring_samples=4096)
    monkeypatch.setattr(models, "TOY", short)

    def train_here(benchmark, untrained, out, *, n_jobs, device):
        for seed, variants in untrained.items():
            training.train_together(benchmark, variants, seed, out, device)

    monkeypatch.setattr(training, "train_all", train_here)
    words = ["synth", "toy", "--variants", "batchtopk,matryoshka", "--seeds", "1", "--jobs", "1"]
    words += ["--tree", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "tree.md").read_text().strip() in out
    for row in ("| random | tested |", "| batchtopk | coverage 0.5 |", "| matryoshka | level |"):
        assert row in out
    assert "| batchtopk | level |" not in out  # it has no levels
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
    path = tmp_path / "runs" / "matryoshka" / "seed_0" / "tree_scores.json"
    kept = json.loads(path.read_text())
    scores = [TreeScore(**values) for values in kept["scores"]]
    assert {(s.parents, s.rule, s.min_cosine) for s in scores} == {
        (parents, rule, min_cosine)
        for parents in ("frequency", "level")
        for rule in ("coverage 0.5", "coverage 0.7", "coverage 0.9", "tested")
        for min_cosine in (0.5, 0.7)
    }
    # again: from what is kept, unless that was made by other rules
    changed = {**kept, "scores": [scores[0]._replace(n_edges=1234)._asdict()]}
    path.write_text(json.dumps(changed))
    assert cli.main(words) == 0
    assert "| 1234 |" in capsys.readouterr().out
    changed["rules"] = {**kept["rules"], "max_rank": 6}
    path.write_text(json.dumps(changed))
    assert cli.main(words) == 0
    assert json.loads(path.read_text()) == kept
