"""How well an SAE recovers the true features, and how much it absorbs parents into children."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic import SyntheticModel
from sae_lens.synthetic.evals import (
    ClassificationMetricsCalculator,
    DeadLatentsCalculator,
    L0Calculator,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from sae_lens.util import cosine_similarities
from scipy.optimize import linear_sum_assignment

from sae_lens_matryoshka.synthetic.models import parents_of

_BATCH_SIZE = 2048


@torch.no_grad()
def score(
    saes: Sequence[SAE[Any]], model: SyntheticModel, n_samples: int
) -> list[dict[str, float]]:
    """Score inference SAEs on the same samples, drawn from torch's default generators.

    Returns:
        Name → value, for each SAE; docs/synthetic.md defines every score.
    """
    scorings = [_Scoring(sae, model) for sae in saes]
    while n_samples > 0:
        x, feature_acts = model.sample_with_features(min(n_samples, _BATCH_SIZE))
        n_samples -= len(x)
        for scoring in scorings:
            scoring.add_batch(x, feature_acts)
    return [scoring.compute() for scoring in scorings]


class _Scoring:
    """The scores of one SAE, over batches."""

    def __init__(self, sae: SAE[Any], model: SyntheticModel):
        self.sae = sae
        self.features = features = model.feature_dict.feature_vectors
        self.cosines = cosine_similarities(sae.W_dec, features)
        self.pairs = _Pairs(self.cosines, features, parents_of(model).to(features.device))
        self.l0, self.true_l0 = L0Calculator(), L0Calculator()
        self.dead = DeadLatentsCalculator(sae.cfg.d_sae)
        self.variance = ExplainedVarianceCalculator()
        self.classification = ClassificationMetricsCalculator(sae.W_dec, features)
        self.n_active = torch.zeros(len(features), device=features.device)

    def add_batch(
        self,
        x: Float[torch.Tensor, "batch d_in"],
        feature_acts: Float[torch.Tensor, "batch n_features"],
    ) -> None:
        acts = self.sae.encode(x)
        self.l0.add_batch(acts)
        self.true_l0.add_batch(feature_acts)
        self.dead.add_batch(acts)
        self.variance.add_batch(self.sae.decode(acts), x)
        self.classification.add_batch(acts, feature_acts)
        self.pairs.add_batch(acts != 0, feature_acts != 0)
        self.n_active += (feature_acts != 0).sum(0)

    def compute(self) -> dict[str, float]:
        detection = self.classification.compute()
        largest = self.cosines.max(0).values
        # with more features than latents, those that an SAE should spend its latents on
        n_representable = min(self.sae.cfg.d_sae, len(self.features))
        most_frequent = self.n_active.topk(n_representable).indices
        return {
            "features_recovered": (largest >= 0.95).sum().item(),
            "mcc": mean_correlation_coefficient(self.sae.W_dec, self.features),
            "mean_max_decoder_cosine": largest[most_frequent].mean().item(),
            "f1": detection.f1_score,
            "precision": detection.precision,
            "recall": detection.recall,
            "uniqueness": feature_uniqueness(self.sae.W_dec, self.features),
            **self.pairs.compute(),
            "explained_variance": self.variance.compute(),
            "l0": self.l0.compute(),
            "dead_latents": self.dead.compute(),
            "true_l0": self.true_l0.compute(),
        }


def match(
    cosines: Float[torch.Tensor, "d_sae n_features"],
) -> tuple[Int[torch.Tensor, " n_matches"], Int[torch.Tensor, " n_matches"]]:
    """Match latents and features by the Hungarian method on absolute cosines, however small.

    Returns:
        Latents, and the features matched with them, ascending.
    """
    features, latents = linear_sum_assignment(cosines.abs().T.cpu().numpy(), maximize=True)
    device = cosines.device
    return torch.as_tensor(latents, device=device), torch.as_tensor(features, device=device)


class _Pairs:
    """Scores of pairs: a feature and its parent, both matched at an absolute cosine of 0.5 or more.

    - `absorption`: of the samples in which parent and child are active, the share in which the
      parent's latent is not; mean over pairs.
    - `parent_alone_miss`: of the samples in which a parent is active without any of its children,
      the share in which its latent is not; mean over the parents of pairs.
    - `leakage`: cosine of the child's decoder row with the true parent, less the cosine of the two
      features; mean over pairs.
    """

    def __init__(
        self,
        cosines: Float[torch.Tensor, "d_sae n_features"],
        features: Float[torch.Tensor, "n_features d_in"],
        parents: Int[torch.Tensor, " n_features"],
    ):
        latents, matched = match(cosines)
        is_close = cosines[latents, matched].abs() >= 0.5
        latent_of = torch.full_like(parents, -1)
        latent_of[matched[is_close]] = latents[is_close]
        children = ((parents >= 0) & (latent_of >= 0)).nonzero().flatten()
        self.children = children[latent_of[parents[children]] >= 0]  # (n_pairs,)
        self.parents = parents[self.children]
        self.parent_latents = latent_of[self.parents]
        self.n_both = torch.zeros(len(self.children), device=features.device)
        self.n_absorbed = torch.zeros_like(self.n_both)

        # a decoder row matched at a negative cosine counts with its sign flipped
        child_latents = latent_of[self.children]
        signs = cosines[child_latents, self.children].sign()
        true_cosines = torch.cosine_similarity(features[self.children], features[self.parents])
        self.leakage = cosines[child_latents, self.parents] * signs - true_cosines

        self.parent_of = parents
        # each parent once, however many of its children were matched
        self.alone = self.parents.unique()
        self.alone_latents = latent_of[self.alone]
        self.n_alone = torch.zeros(len(self.alone), device=features.device)
        self.n_missed = torch.zeros_like(self.n_alone)

    def add_batch(
        self,
        fires: Bool[torch.Tensor, "batch d_sae"],
        is_active: Bool[torch.Tensor, "batch n_features"],
    ) -> None:
        both = is_active[:, self.parents] & is_active[:, self.children]
        self.n_both += both.sum(0)
        self.n_absorbed += (both & ~fires[:, self.parent_latents]).sum(0)

        has_parent = self.parent_of >= 0
        n_children = torch.zeros(is_active.shape, device=is_active.device)
        n_children.index_add_(1, self.parent_of[has_parent], is_active[:, has_parent].float())
        alone = is_active[:, self.alone] & (n_children[:, self.alone] == 0)
        self.n_alone += alone.sum(0)
        self.n_missed += (alone & ~fires[:, self.alone_latents]).sum(0)

    def compute(self) -> dict[str, float]:
        means = {
            "absorption": (self.n_absorbed / self.n_both)[self.n_both > 0],
            "parent_alone_miss": (self.n_missed / self.n_alone)[self.n_alone > 0],
            "leakage": self.leakage,
        }
        return {
            "n_pairs": float(len(self.children)),
            **{name: values.mean().item() for name, values in means.items() if len(values)},
        }
