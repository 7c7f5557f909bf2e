"""The benchmarks have the probabilities, directions and parents that they document."""

import pytest
import torch
from sae_lens.synthetic import SyntheticModel

from sae_lens_matryoshka.synthetic.models import (
    SYNTHSAEBENCH,
    TOY,
    parents_of,
    synthsaebench_model,
    toy_model,
)
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream

PARENTS, CHILDREN, INDEPENDENT = [0, 4, 8], [1, 2, 3, 5, 6, 7, 9, 10, 11], list(range(12, 20))
N = 400_000


@pytest.fixture(scope="module")
def feature_acts() -> torch.Tensor:
    torch.manual_seed(0)
    return toy_model(0).sample_with_features(N)[1]


def test_toy_probabilities(feature_acts):
    p = feature_acts.mean(0)  # magnitudes are 0 and 1
    assert set(feature_acts.unique().tolist()) == {0.0, 1.0}
    deviation = 5 * (0.15 / N) ** 0.5
    torch.testing.assert_close(p[PARENTS], torch.full((3,), 0.15), atol=deviation, rtol=0)
    torch.testing.assert_close(p[CHILDREN], torch.full((9,), 0.03), atol=deviation, rtol=0)
    torch.testing.assert_close(p[INDEPENDENT], torch.full((8,), 0.05), atol=deviation, rtol=0)
    assert p.sum().item() == pytest.approx(1.12, abs=0.01)
    for parent in PARENTS:
        given = feature_acts[feature_acts[:, parent] > 0]
        siblings = given[:, parent + 1 : parent + 4].mean(0)
        torch.testing.assert_close(siblings, torch.full((3,), 0.2), atol=0.01, rtol=0)


def test_toy_children_exclude_each_other_and_need_their_parent(feature_acts):
    for parent in PARENTS:
        n_children = feature_acts[:, parent + 1 : parent + 4].sum(1)
        assert n_children.max() == 1
        assert (n_children <= feature_acts[:, parent]).all()


def test_the_samples_of_a_seed_stay_the_same():
    """Results in a folder and in docs/ can be repeated: the counts are those of version 0.1."""
    with RandomStream(3, Purpose.SAMPLES).active():
        _, feature_acts = toy_model(3).sample_with_features(2000)
    tree = [316, 75, 53, 66, 296, 65, 50, 63, 279, 49, 46, 65]
    assert feature_acts.sum(0).tolist() == [*tree, 90, 102, 117, 105, 100, 95, 94, 92]


def test_toy_directions_are_orthogonal_and_depend_on_the_seed():
    features = toy_model(3).feature_dict.feature_vectors
    torch.testing.assert_close(features @ features.T, torch.eye(20), atol=1e-6, rtol=0)
    assert torch.equal(features, toy_model(3).feature_dict.feature_vectors)
    assert (features - toy_model(4).feature_dict.feature_vectors).abs().max() > 0.1


def test_toy_activations_are_sums_of_features():
    model = toy_model(1)
    x, feature_acts = model.sample_with_features(50)
    torch.testing.assert_close(x, feature_acts @ model.feature_dict.feature_vectors)


def test_parents():
    expected = [-1, 0, 0, 0, -1, 4, 4, 4, -1, 8, 8, 8, *[-1] * 8]
    assert parents_of(toy_model(0)).tolist() == expected


def test_synthsaebench_is_what_saelens_makes_of_its_config():
    model = synthsaebench_model(0, n_features=90, d_in=24, n_roots=2)
    own = SyntheticModel(model.cfg)
    assert torch.equal(model.feature_dict.feature_vectors, own.feature_dict.feature_vectors)
    assert torch.equal(model.feature_dict.bias, own.feature_dict.bias)
    batches = []
    for each in (model, own, synthsaebench_model(7, n_features=90, d_in=24, n_roots=2)):
        torch.manual_seed(5)
        batches.append(each.sample(100))
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])  # the seed of a run changes no feature


def test_synthsaebench_children_are_active_only_with_their_parent():
    model = synthsaebench_model(0, n_features=90, d_in=24, n_roots=2)
    parents = parents_of(model)
    torch.manual_seed(0)
    _, feature_acts = model.sample_with_features(2000)
    is_child = parents >= 0
    assert is_child.sum() > 20
    active = feature_acts[:, is_child] > 0
    assert (feature_acts[:, parents[is_child]][active] > 0).all()


def test_sizes_fit():
    for benchmark in (TOY, *SYNTHSAEBENCH.values()):
        assert benchmark.matryoshka_widths[-1] == benchmark.d_sae
        assert benchmark.n_samples >= benchmark.batch_size
