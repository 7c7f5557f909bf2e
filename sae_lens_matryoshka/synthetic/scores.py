"""How well an SAE recovers the true features, and how much it absorbs parents into children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

RECOVERED_COSINE = 0.95
MATCHED_COSINE = 0.5
_BATCH_SIZE = 2048


@torch.no_grad()
def score(
    saes: Sequence[SAE[Any]], model: SyntheticModel, n_samples: int
) -> list[dict[str, float]]:
    """Score SAEs on the same samples, drawn from torch's default generators.

    Latents and true features are matched by the Hungarian method on the absolute cosine of decoder
    row and feature, which has to be 0.5. A pair is a feature and its parent, both matched.

    - `features_recovered`: true features with a decoder row at a cosine of 0.95 or more.
    - `mcc`: mean absolute cosine of Hungarian-matched latents and features (SAELens).
    - `mean_max_decoder_cosine`: mean over true features of the largest cosine with a decoder row.
      Where there are more features than latents, over the d_sae most frequent features.
    - `f1`, `precision`, `recall`: mean over latents, each as a detector of the feature nearest to
      its decoder row (SAELens).
    - `uniqueness`: distinct nearest features per latent (SAELens).
    - `absorption`: of the samples in which parent and child are active, the share in which the
      parent's latent is not; mean over pairs, left out where there is none.
    - `parent_alone_miss`: the complement. Of the samples in which a parent is active without any of
      its children, the share in which its latent is not; mean over the parents of pairs.
    - `leakage`: cosine of the child's decoder row with the true parent, less the cosine of the two
      features; mean over pairs.
    - `n_pairs`: number of pairs behind the last three.
    - `explained_variance`, `l0` (active latents per sample), `dead_latents` (latents never active):
      SAELens.
    - `true_l0`: active features per sample.

    Args:
        saes: Inference SAEs, on the model's device.
        model: Source of the activations.
        n_samples: Activations to score on.

    Returns:
        Name → value, for each SAE.
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
        self.pairs = _Pairs(self.cosines, features, parents_of(model))
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
        n_representable = min(self.sae.cfg.d_sae, len(self.features))
        most_active = self.n_active.topk(n_representable).indices
        return {
            "features_recovered": (largest >= RECOVERED_COSINE).sum().item(),
            "mcc": mean_correlation_coefficient(self.sae.W_dec, self.features),
            "mean_max_decoder_cosine": largest[most_active].mean().item(),
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


class Match(NamedTuple):
    """Latents and the true features matched with them, ordered by feature."""

    latents: Int[torch.Tensor, " n_matches"]
    features: Int[torch.Tensor, " n_matches"]


def match(cosines: Float[torch.Tensor, "d_sae n_features"]) -> Match:
    """Match latents and features by the Hungarian method on absolute cosines, however small."""
    rows, columns = linear_sum_assignment(cosines.abs().cpu().numpy(), maximize=True)
    latents = torch.as_tensor(rows, device=cosines.device)
    features = torch.as_tensor(columns, device=cosines.device)
    order = features.argsort()
    return Match(latents[order], features[order])


class _Pairs:
    """Absorption, misses and leakage of parent–child pairs, counted over batches."""

    def __init__(
        self,
        cosines: Float[torch.Tensor, "d_sae n_features"],
        features: Float[torch.Tensor, "n_features d_in"],
        parents: Int[torch.Tensor, " n_features"],
    ):
        parents = parents.to(features.device)
        latents, matched = match(cosines)
        is_close = cosines[latents, matched].abs() >= MATCHED_COSINE
        latent_of = torch.full_like(parents, -1)
        latent_of[matched[is_close]] = latents[is_close]

        self.parent_of = parents
        children = ((parents >= 0) & (latent_of >= 0)).nonzero().flatten()
        self.children = children[latent_of[parents[children]] >= 0]  # (n_pairs,)
        self.parents = parents[self.children]
        self.child_latents = latent_of[self.children]
        self.parent_latents = latent_of[self.parents]
        self.cosines = cosines
        directions = torch.nn.functional.normalize(features, dim=1)
        self.true_cosines = (directions[self.children] * directions[self.parents]).sum(1)

        self.n_absorbed = torch.zeros(len(self.children), device=features.device)
        self.n_both = torch.zeros_like(self.n_absorbed)
        # Each parent once, however many of its children were matched.
        self.alone = self.parents.unique()
        self.alone_latents = latent_of[self.alone]
        self.n_missed = torch.zeros(len(self.alone), device=features.device)
        self.n_alone = torch.zeros_like(self.n_missed)

    def add_batch(
        self,
        fires: Bool[torch.Tensor, "batch d_sae"],
        is_active: Bool[torch.Tensor, "batch n_features"],
    ) -> None:
        """Count a batch.

        Args:
            fires: Whether each latent is active.
            is_active: Whether each true feature is.
        """
        both = is_active[:, self.parents] & is_active[:, self.children]
        self.n_both += both.sum(0)
        self.n_absorbed += (both & ~fires[:, self.parent_latents]).sum(0)

        has_parent = self.parent_of >= 0
        n_children = torch.zeros(is_active.shape, device=is_active.device)
        n_children.index_add_(
            1, self.parent_of[has_parent], is_active[:, has_parent].to(n_children.dtype)
        )
        alone = is_active[:, self.alone] & (n_children[:, self.alone] == 0)
        self.n_alone += alone.sum(0)
        self.n_missed += (alone & ~fires[:, self.alone_latents]).sum(0)

    def compute(self) -> dict[str, float]:
        """The scores of pairs, without the means over nothing."""
        means = {
            "absorption": (self.n_absorbed / self.n_both)[self.n_both > 0],
            "parent_alone_miss": (self.n_missed / self.n_alone)[self.n_alone > 0],
            "leakage": self._leakage(),
        }
        return {
            "n_pairs": float(len(self.children)),
            **{name: values.mean().item() for name, values in means.items() if len(values)},
        }

    def _leakage(self) -> Float[torch.Tensor, " n_pairs"]:
        # A decoder row matched at a negative cosine counts with its sign flipped.
        signs = self.cosines[self.child_latents, self.children].sign()
        return self.cosines[self.child_latents, self.parents] * signs - self.true_cosines
