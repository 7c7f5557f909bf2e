"""The evidence of pairs, against loops over tokens, and the chance that it is compared with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sae_lens_matryoshka.tree import coactivation, directions, nearby
from sae_lens_matryoshka.tree.chance import Clustering, clustering_of, p_values
from sae_lens_matryoshka.tree.coactivation import Eligible, coverage_interval, frequent_pairs
from sae_lens_matryoshka.tree.directions import direction_evidence, means_of
from sae_lens_matryoshka.tree.edges import information
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.nearby import nearby_rate
from sae_lens_matryoshka.tree.sources import StoredActivations
from tests.tree.worlds import D_IN, exact_sae

N_TOKENS, D_SAE = 1500, 10


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N_TOKENS, D_IN, generator=generator) + torch.linspace(0.8, -0.5, D_IN)


@pytest.fixture(scope="module")
def gathered(x, tmp_path_factory) -> Gathered:
    sae = exact_sae(D_SAE)
    return gather(sae, StoredActivations(x, sae), tmp_path_factory.mktemp("g") / "g", N_TOKENS)


def fires_of(x: torch.Tensor) -> np.ndarray:
    return (exact_sae(D_SAE).encode(x) > 0).numpy()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("block", [1, 25, 2**26])
def test_pairs_equal_a_loop(shifted, by_level, block, x, gathered, monkeypatch):
    monkeypatch.setattr(coactivation, "_BLOCK_ELEMENTS", block)
    fires = fires_of(x)
    children = np.roll(fires, gathered.shift, axis=0) if shifted else fires
    rank = np.arange(D_SAE) // 4
    eligible = Eligible(rank, by_level, fires.sum(0))
    pairs = frequent_pairs(gathered, eligible, 0.25, shifted)
    expected, n_looked_at = {}, 0
    for p in range(D_SAE):
        for c in range(D_SAE):
            if fires[:, p].sum() > fires[:, c].sum() and (not by_level or rank[p] < rank[c]):
                n_looked_at += 1
                n_both = (fires[:, p] & children[:, c]).sum()
                if n_both >= 0.25 * fires[:, c].sum():
                    expected[p, c] = n_both
    assert dict(zip(zip(pairs[0], pairs[1], strict=True), pairs[2], strict=True)) == expected
    assert eligible.n_pairs() == n_looked_at
    assert len(expected) > 3

    # the same pairs' tokens near each other, and directions
    monkeypatch.setattr(nearby, "_ELEMENTS", block)
    monkeypatch.setattr(directions, "_BLOCK_ELEMENTS", block)
    rates = nearby_rate(gathered, pairs, shifted)
    W_dec = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0))
    evidence = direction_evidence(means_of(gathered, shifted), W_dec, pairs)
    rows = torch.nn.functional.normalize(W_dec, dim=1).numpy()
    values = x.numpy()
    for i, (p, c, n_both) in enumerate(zip(*pairs, strict=True)):
        if not shifted:  # blocks of a shifted copy are cut where shards end
            crossed, squares, silent = 0, 0, 0
            starts = _block_starts(gathered)
            for start, stop in zip(starts, [*starts[1:], N_TOKENS], strict=True):
                n_child = fires[start:stop, c].sum()
                crossed += n_child * fires[start:stop, p].sum()
                squares += n_child**2
                silent += n_child * (stop - start - n_child)
            expected_rate = (crossed - n_both / fires[:, c].sum() * squares) / silent
            assert rates[i] == pytest.approx(np.clip(expected_rate, 0, 1), rel=1e-4)
        first = gathered.shift if shifted else 0
        of_child = values[first:][children[first:, c]].mean(0) - values.mean(0)
        of_parent = values[fires[:, p]].mean(0) - values.mean(0)
        cosines = rows @ of_child
        cosines[c] = -np.inf
        assert evidence.rank[i] == 1 + (cosines > cosines[p]).sum()
        along = of_parent @ rows[p]
        if along > 0:
            assert evidence.presence[i] == pytest.approx(of_child @ rows[p] / along, rel=1e-2)
        else:
            assert np.isnan(evidence.presence[i])


def _block_starts(gathered: Gathered) -> np.ndarray:
    starts, first = [], 0
    for shard in gathered.index.shards:
        starts.append(np.arange(first, first + shard.n_rows, 64))
        first += shard.n_rows
    return np.concatenate(starts)


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_interval_is_wilsons(n_both: int, n_child: int) -> None:
    n_both = min(n_both, n_child)
    interval = stats.binomtest(n_both, n_child).proportion_ci(0.95, "wilson")
    low, high = coverage_interval(np.array([n_both]), np.array([n_child]))
    assert low[0] == pytest.approx(interval.low, abs=1e-4)
    assert high[0] == pytest.approx(interval.high, abs=1e-4)


@given(st.data())
def test_information_of_a_table(data: st.DataObject) -> None:
    n = data.draw(st.integers(4, 200))
    n_parent, n_child = (data.draw(st.integers(1, n - 1)) for _ in range(2))
    n_both = data.draw(st.integers(max(0, n_parent + n_child - n), min(n_parent, n_child)))
    joint = np.array([[n_both, n_parent - n_both], [n_child - n_both, 0]], float)
    joint[1, 1] = n - joint.sum()
    joint /= n
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    expected = stats.entropy(joint.ravel(), product.ravel(), base=2)
    arrays = (np.array([value]) for value in (n_both, n_parent, n_child))
    assert information(*arrays, n)[0] == pytest.approx(expected, abs=1e-9)


def clustered(n_tokens: int, p: float, p_document: float, run: int, rng) -> np.ndarray:
    """Firings in some documents of 128 tokens alone, in runs."""
    n = n_tokens // run
    has = rng.random(n_tokens // 128) < p_document
    starts = rng.random(n) < p / p_document
    return np.repeat(starts, run) & np.repeat(has, 128)


@pytest.mark.parametrize(("p_document", "run"), [(1.0, 1), (1.0, 4), (0.05, 1), (0.05, 4)], ids=str)
def test_p_values_of_independent_latents(p_document, run, tmp_path):
    """Latents that cluster, but independently: p-values are no smaller than uniform ones."""
    rng = np.random.default_rng(0)
    n_tokens, d_sae = 2**15, 60
    rates = rng.uniform(0.005, 0.03, d_sae)
    fires = [clustered(n_tokens, rate, p_document, run, rng) for rate in rates]
    x = torch.zeros(n_tokens, d_sae)
    x[:] = torch.from_numpy(np.stack(fires, 1).astype(np.float32))
    sae = exact_sae(d_sae, d_in=d_sae)
    gathered = gather(sae, StoredActivations(x, sae), tmp_path / "g", n_tokens)
    clustering = clustering_of(gathered)
    a, b = np.triu_indices(d_sae, 1)
    n_both = (x.T @ x).numpy()[a, b].astype(int)
    p = p_values(n_both, *clustering.expected(a, b))
    for alpha in (0.1, 0.01, 0.001):
        assert (p < alpha).mean() < 1.5 * alpha + 3 / len(p), alpha
    # and it is no blunt test either
    assert (p < 0.5).mean() > 0.25
    if p_document < 1:  # Poisson's distribution would call many of these pairs surprising
        mean, _ = clustering.expected(a, b)
        assert (stats.poisson.sf(n_both - 1, mean) < 0.001).mean() > 0.01


def test_energies_add_up(gathered, x):
    clustering: Clustering = clustering_of(gathered)
    fires = fires_of(x)
    total = fires.sum(0) - fires.sum(0) ** 2 / N_TOKENS
    np.testing.assert_allclose(clustering.energies.sum(0), total)
    assert clustering.degrees.sum() == N_TOKENS - 1
    # the innermost scale: within blocks of four tokens of a shard
    within, first = np.zeros(D_SAE), 0
    for shard in gathered.index.shards:
        rows = fires[first : first + shard.n_rows]
        for start in range(0, shard.n_rows, 4):
            block = rows[start : start + 4]
            within += block.sum(0) - block.sum(0) ** 2 / len(block)
        first += shard.n_rows
    np.testing.assert_allclose(clustering.energies[0], within)


@settings(max_examples=30)
@given(st.floats(0.1, 50), st.floats(0.5, 20), st.integers(0, 80))
def test_p_values_have_the_mean_and_variance(mean: float, factor: float, n: int) -> None:
    (p,) = p_values(np.array([n]), np.array([mean]), np.array([mean * factor]))
    if factor > 1 + 1e-6:
        distribution = stats.nbinom(mean / (factor - 1), 1 / factor)
        assert distribution.mean() == pytest.approx(mean)
        assert distribution.var() == pytest.approx(mean * factor)
        assert p == pytest.approx(distribution.sf(n - 1), rel=1e-6)
    elif factor <= 1:
        assert p == pytest.approx(stats.poisson.sf(n - 1, mean))
