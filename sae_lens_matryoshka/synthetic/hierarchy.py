"""Edges between latents, compared with the true hierarchy of the features."""

from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities

from sae_lens_matryoshka.synthetic.models import parents_of
from sae_lens_matryoshka.synthetic.scores import match

Pair = tuple[int, int]  # parent and child, both features


class Truth(NamedTuple):
    """The true hierarchy, and which features the latents of an SAE stand for.

    Attributes:
        feature_of: The feature of each latent, −1 if it is matched to none.
        parent_of: The parent of each feature, −1 if it has none.
    """

    feature_of: Int[np.ndarray, " d_sae"]
    parent_of: Int[np.ndarray, " n_features"]


def truth_of(sae: SAE[Any], model: SyntheticModel, min_cosine: float) -> Truth:
    """Match latents and features by the Hungarian method, from this absolute cosine on."""
    cosines: Float[torch.Tensor, "d_sae n_features"]
    cosines = cosine_similarities(sae.W_dec, model.feature_dict.feature_vectors).detach()
    latents, features = match(cosines)
    is_close = cosines[latents, features].abs() >= min_cosine
    feature_of = np.full(len(cosines), -1)
    feature_of[latents[is_close].cpu().numpy()] = features[is_close].cpu().numpy()
    return Truth(feature_of, parents_of(model).numpy())


def compare(edges: pd.DataFrame, truth: Truth) -> dict[str, Any]:
    """Compare edges with the truth; `trees.TreeScore` defines the values.

    Args:
        edges: Their `parent` and `child`, latents, and whether they are `direct` and `strongest`.
        truth: What to compare with.
    """
    matched = {int(feature) for feature in truth.feature_of if feature >= 0}
    ancestors = {feature: _ancestors(feature, truth.parent_of) for feature in matched}
    related = {(a, f) for f, line in ancestors.items() for a in line if a in matched}
    parents = {(p, f) for p, f in related if p == truth.parent_of[f]}
    nearest = {
        (next(a for a in line if a in matched), f)
        for f, line in ancestors.items()
        if matched.intersection(line)
    }
    found = _features(edges, truth)
    direct = _features(edges[edges["direct"]], truth)
    strongest = _features(edges[edges["strongest"]], truth)
    return {
        "n_edges": len(edges),
        "n_judged": len(found),
        "precision": _share(found, related, of=found),
        "recall": _share(found, related, of=related),
        "n_parents": len(parents),
        "parents_found": _share(found, parents, of=parents),
        "direct_precision": _share(direct, nearest, of=direct),
        "direct_recall": _share(direct, nearest, of=nearest),
        "strongest_precision": _share(strongest, nearest, of=strongest),
    }


def _features(edges: pd.DataFrame, truth: Truth) -> set[Pair]:
    """The features of edges whose two latents are both matched."""
    pairs = truth.feature_of[edges[["parent", "child"]].to_numpy(dtype=int)]
    return {(int(parent), int(child)) for parent, child in pairs[(pairs >= 0).all(1)]}


def _ancestors(feature: int, parent_of: Int[np.ndarray, " n_features"]) -> list[int]:
    """The parent of a feature, its parent, and so on."""
    found = []
    while (feature := int(parent_of[feature])) >= 0:
        found.append(feature)
    return found


def _share(found: Set[Pair], true: Set[Pair], of: Set[Pair]) -> float | None:
    return len(found & true) / len(of) if of else None
