"""Trees of SAEs compared with the true hierarchy."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.synthetic import models, training
from sae_lens_matryoshka.synthetic.hard import DOCUMENT, hard_model
from sae_lens_matryoshka.synthetic.models import TOY, parents_of
from sae_lens_matryoshka.synthetic.trees import TreeScore, compare, random_sae, tree_table

# two trees of features: 0 → 1 → 2 → 3 and 4 → 5; feature 6 stands alone
PARENT_OF = np.array([-1, 0, 1, 2, -1, 4, -1])


def edges(*pairs: tuple[int, int]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["parent", "child"])


def test_a_perfect_tree():
    latents = np.arange(7)[::-1]  # latent 6 is feature 0, and so on
    every = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (4, 5)]
    scores = compare(edges(*((6 - p, 6 - c) for p, c in every)), latents, PARENT_OF)
    assert scores == {
        "n_edges": 7,
        "precision": 1,
        "recall": 1,
        "direct_precision": 1,
        "direct_recall": 1,
    }


def test_errors_of_every_kind():
    feature_of = np.array([0, 1, -1, 3, 4, 5, 6])  # feature 2 has no latent
    found = edges((0, 1), (0, 3), (6, 5), (2, 6), (1, 0))
    scores = compare(found, feature_of, PARENT_OF)
    # (2, 6) is an edge of a latent without a feature; (6, 5) and (1, 0) are false
    assert scores["n_edges"] == 4
    assert scores["precision"] == 2 / 4
    assert scores["recall"] == 1 / 2  # of (0, 1) and (4, 5)
    # the nearest ancestors are (0, 1), (1, 3) and (4, 5)
    assert scores["direct_recall"] == 1 / 3
    assert compare(edges(), feature_of, PARENT_OF)["precision"] is None
    assert compare(edges(), np.full(7, -1), PARENT_OF)["recall"] is None


def test_a_way_around_makes_an_edge_indirect():
    found = edges((0, 1), (1, 2), (0, 2))
    scores = compare(found, np.arange(7), PARENT_OF)
    assert (scores["direct_precision"], scores["direct_recall"]) == (1, 2 / 4)
    without = compare(edges((0, 1), (0, 2)), np.arange(7), PARENT_OF)
    assert (without["direct_precision"], without["precision"]) == (1 / 2, 1)


def test_the_table_has_means_and_deviations():
    scores = [
        TreeScore("a", seed, "level", "tested", n, 0.5 + 0.1 * seed, 1.0, None, 0.25, 0.0)
        for seed, n in ((0, 10), (1, 20))
    ]
    table = tree_table(scores)
    assert "| a | level | tested | 15 ± 7 | 0.550 ± 0.071 | 1.000 ± 0.000 |  | 0.250 ±" in table


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
    for row in ("| random | level | tested |", "| batchtopk | frequency | coverage 0.5 |"):
        assert row in out
    assert "| batchtopk | level |" not in out
    kept = tmp_path / "runs" / "matryoshka" / "seed_0" / "tree_scores.json"
    scores = [TreeScore(**values) for values in json.loads(kept.read_text())]
    assert {(s.parents, s.rule) for s in scores} == {
        (parents, rule)
        for parents in ("frequency", "level")
        for rule in ("coverage 0.5", "coverage 0.7", "coverage 0.9", "tested")
    }
    # again, from what is kept
    kept.write_text(json.dumps([scores[0]._replace(n_edges=1234.0)._asdict()]))
    assert cli.main(words) == 0
    assert "| 1234 |" in capsys.readouterr().out
