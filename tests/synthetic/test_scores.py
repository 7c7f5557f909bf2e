"""The scores of SAEs built by hand, for which each score is known."""

import math

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import SyntheticModel
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data

from sae_lens_matryoshka.synthetic import scores as scoring
from sae_lens_matryoshka.synthetic.models import parents_of, synthsaebench_model, toy_model
from sae_lens_matryoshka.synthetic.scores import match

PARENTS = [0, 4, 8]
CHILDREN = [1, 2, 3, 5, 6, 7, 9, 10, 11]


def score(sae: JumpReLUSAE, model: SyntheticModel, n_samples: int) -> dict[str, float]:
    (scores,) = scoring.score([sae], model, n_samples)
    return scores


def sae_of(W_dec: torch.Tensor, W_enc: torch.Tensor, threshold: float = 0.5) -> JumpReLUSAE:
    """A JumpReLU SAE of decoder rows and encoder rows, (d_sae, d_in) each."""
    d_sae, d_in = W_dec.shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    state = {
        "W_dec": W_dec,
        "W_enc": W_enc.T,
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.full((d_sae,), threshold),
    }
    sae.load_state_dict(state)
    return sae


@pytest.fixture
def model() -> SyntheticModel:
    torch.manual_seed(0)
    return toy_model(0)


@pytest.fixture
def features(model: SyntheticModel) -> torch.Tensor:
    return model.feature_dict.feature_vectors.detach()


def test_perfect(model, features):
    shuffled = features[torch.randperm(20)]
    scores = score(sae_of(shuffled, shuffled), model, 20_000)
    assert scores["features_recovered"] == 20
    for name in ("mcc", "mean_max_decoder_cosine", "f1", "precision", "recall", "uniqueness"):
        assert scores[name] == pytest.approx(1), name
    assert scores["explained_variance"] == pytest.approx(1)
    assert scores["absorption"] == 0
    assert scores["parent_alone_miss"] == 0
    assert scores["leakage"] == pytest.approx(0, abs=1e-6)
    assert scores["n_pairs"] == 9
    assert scores["dead_latents"] == 0
    assert scores["l0"] == scores["true_l0"] == pytest.approx(1.12, abs=0.05)


@pytest.mark.parametrize("sign", [1, -1])
def test_absorbing(model, features, sign):
    """Parents are silent beside a child, whose latent stands for both."""
    W_dec, W_enc = features.clone(), features.clone()
    for parent in PARENTS:
        own = slice(parent + 1, parent + 4)
        W_dec[own] = sign * (features[own] + features[parent])
        W_enc[parent] -= features[own].sum(0)
    scores = score(sae_of(W_dec, W_enc), model, 20_000)
    assert scores["absorption"] == 1
    assert scores["parent_alone_miss"] == 0
    assert scores["leakage"] == pytest.approx(1 / math.sqrt(2), abs=1e-6)
    assert scores["features_recovered"] == 11
    assert scores["mcc"] == pytest.approx((11 + 9 / math.sqrt(2)) / 20, abs=1e-6)
    assert scores["l0"] == pytest.approx(3 * 0.15 + 8 * 0.05, abs=0.03)
    if sign > 0:
        assert scores["explained_variance"] == pytest.approx(1)


def test_the_complement_of_absorption(model, features):
    """Latents of parents that are active only beside a child."""
    W_enc = features.clone()
    for parent in PARENTS:
        W_enc[parent] = features[parent + 1 : parent + 4].sum(0)
    scores = score(sae_of(features, W_enc), model, 20_000)
    assert (scores["absorption"], scores["parent_alone_miss"]) == (0, 1)


def test_one_pair_of_nine_absorbs(model, features):
    W_enc = features.clone()
    W_enc[0] -= features[2]  # the first parent is silent beside its second child
    assert score(sae_of(features, W_enc), model, 20_000)["absorption"] == pytest.approx(1 / 9)


def test_without_pairs_their_scores_are_left_out(model, features):
    alone = features[12:]
    scores = score(sae_of(alone, alone), model, 5000)
    assert scores["n_pairs"] == 0
    assert not {"absorption", "parent_alone_miss", "leakage"} & scores.keys()
    assert scores["features_recovered"] == 8


def test_latents_far_from_every_feature_are_not_matched(model, features):
    """Cosine 0.4 with a child is no match, so its pair is not scored."""
    W_dec = features.clone()
    W_dec[1] = 0.4 * features[1] + math.sqrt(1 - 0.4**2) * features[19]
    assert score(sae_of(W_dec, features), model, 5000)["n_pairs"] == 8


def test_several_saes_are_scored_on_the_same_samples(model, features):
    saes = [sae_of(features, features), sae_of(features, features, threshold=2.0)]
    torch.manual_seed(1)
    both = scoring.score(saes, model, 3000)
    for sae, scores in zip(saes, both, strict=True):
        torch.manual_seed(1)
        assert score(sae, model, 3000) == scores


def test_dead_latents(model, features):
    scores = score(sae_of(features, features, threshold=2.0), model, 5000)
    assert (scores["dead_latents"], scores["l0"], scores["f1"]) == (20, 0, 0)
    assert (scores["absorption"], scores["parent_alone_miss"]) == (1, 1)


def test_more_features_than_latents(model, features):
    """The nine children are the rarest, so an SAE with all others has all that it can."""
    others = [i for i in range(20) if i not in CHILDREN]
    scores = score(sae_of(features[others], features[others]), model, 50_000)
    assert scores["mean_max_decoder_cosine"] == pytest.approx(1)
    assert scores["features_recovered"] == 11


def test_pair_scores_equal_a_loop_over_pairs():
    """A noisy SAE on features that are not orthogonal, with grandchildren."""
    model = synthsaebench_model(0, n_features=90, d_in=48, n_roots=2)
    parents = parents_of(model).tolist()
    features = model.feature_dict.feature_vectors.detach()
    generator = torch.Generator().manual_seed(1)
    rows = features[:60] + 0.08 * torch.randn(60, 48, generator=generator)
    sae = sae_of(rows, rows, threshold=3.0)
    torch.manual_seed(2)
    scores = score(sae, model, 5000)
    torch.manual_seed(2)
    batches = [model.sample_with_features(n) for n in (2048, 2048, 904)]
    x, feature_acts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    fires, active = sae.encode(x) != 0, feature_acts > 0

    cosines = torch.nn.functional.normalize(rows, dim=1) @ features.T
    latents, matched = match(cosines)
    latent_of = {
        int(f): int(latent)
        for latent, f in zip(latents, matched, strict=True)
        if cosines[latent, f].abs() >= 0.5
    }
    absorbed, leaked, missed = [], [], {}
    for child, parent in enumerate(parents):
        if parent < 0 or child not in latent_of or parent not in latent_of:
            continue
        both = active[:, parent] & active[:, child]
        leaked.append(cosines[latent_of[child], parent] - features[child] @ features[parent])
        if both.any():
            absorbed.append(1 - fires[both, latent_of[parent]].float().mean())
        siblings = [i for i, other in enumerate(parents) if other == parent]
        alone = active[:, parent] & ~active[:, siblings].any(1)
        if alone.any():
            missed[parent] = 1 - fires[alone, latent_of[parent]].float().mean()
    assert len(absorbed) > 10
    assert scores["n_pairs"] == len(leaked)
    assert scores["absorption"] == pytest.approx(torch.stack(absorbed).mean().item(), abs=1e-5)
    assert scores["leakage"] == pytest.approx(torch.stack(leaked).mean().item(), abs=1e-5)
    misses = torch.stack(list(missed.values()))
    assert scores["parent_alone_miss"] == pytest.approx(misses.mean().item(), abs=1e-5)
    assert 0 < scores["absorption"] < 1

    torch.manual_seed(2)
    own = eval_sae_on_synthetic_data(
        sae, model.feature_dict, model.activation_generator, 5000, batch_size=2048
    )
    for name in ("mcc", "uniqueness", "explained_variance", "dead_latents", "true_l0"):
        assert scores[name] == pytest.approx(getattr(own, name)), name
    assert scores["l0"] == own.sae_l0
    assert scores["f1"] == own.classification.f1_score
