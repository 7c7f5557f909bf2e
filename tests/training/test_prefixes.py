"""Prefixes drawn at each step: their law, and that nothing but seed and step decides them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.prefixes import sample_prefixes

EXPONENTS = {"uniform": 0, "log_uniform": -1, "inverse_sqrt": -0.5, "pareto": -1.5}


@given(
    distribution=st.sampled_from(sorted(EXPONENTS)),
    d_sae=st.integers(1, 300),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**7),
    data=st.data(),
)
def test_prefixes_nest_and_end_at_d_sae(
    distribution: str, d_sae: int, seed: int, step: int, data: st.DataObject
) -> None:
    minimum = data.draw(st.integers(1, d_sae))
    n = data.draw(st.integers(1, d_sae - minimum + 1))
    prefixes = sample_prefixes(distribution, n, minimum, d_sae, (seed, step))
    assert len(prefixes) == n
    assert prefixes[-1] == d_sae
    assert prefixes == sorted(set(prefixes))
    assert prefixes[0] >= minimum
    assert prefixes == sample_prefixes(distribution, n, minimum, d_sae, (seed, step))


@pytest.mark.parametrize("distribution", sorted(EXPONENTS))
def test_lengths_follow_their_law(distribution: str) -> None:
    d_sae = 4096
    lengths = np.array(
        [sample_prefixes(distribution, 2, 1, d_sae, (0, step))[0] for step in range(4000)]
    )
    law = np.arange(1, d_sae, dtype=float) ** EXPONENTS[distribution]
    for quantile in (1, 8, 64, 512, 2048):
        expected = law[:quantile].sum() / law.sum()
        assert (lengths <= quantile).mean() == pytest.approx(expected, abs=0.03)


def test_the_two_paretos_differ_as_published() -> None:
    """The median length is N/4 where the density is l^-1/2, and a handful where it is l^-3/2."""
    d_sae = 65536
    medians = {
        name: np.median([sample_prefixes(name, 2, 1, d_sae, (1, s))[0] for s in range(600)])
        for name in ("inverse_sqrt", "pareto")
    }
    assert medians["inverse_sqrt"] == pytest.approx(d_sae / 4, rel=0.2)
    assert medians["pareto"] <= 4


def test_a_config_draws_by_seed_and_step() -> None:
    def drawn(seed: int, step: int) -> list[int]:
        cfg = MatryoshkaTrainingSAEConfig(
            d_in=8, d_sae=512, k=4, prefix_sampling="log_uniform", n_prefixes=6, prefix_seed=seed
        )
        return cfg.prefixes_at(step)

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) != drawn(0, 4)
    assert drawn(0, 3) != drawn(1, 3)
