"""A world in which latents fire together for many reasons, of which a hierarchy is one.

Its features are built from SAELens' synthetic parts:

- trees of three generations, half of them on certain documents only,
- independent features that are active on 30 to 50 % of the tokens,
- groups of correlated features without a hierarchy,
- topics: features that are independent of each other within the documents that they occur in,
- rare independent features, so that there are more features than latents.

A document is 100 consecutive samples of a batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    Hierarchy,
    HierarchyNode,
    LowRankCorrelationMatrix,
    SyntheticModel,
    SyntheticModelConfig,
    hierarchy_modifier,
    orthogonal_initializer,
)

from sae_lens_matryoshka.synthetic.models import Benchmark

D_IN = 128
DOCUMENT = 100  # samples; not a multiple of the blocks that the tree counts in
_N_DENSE, _N_TREES, _N_GROUPS, _N_TOPICS, _N_RARE = 6, 24, 16, 8, 378
_CHILDREN, _GRANDCHILDREN, _GROUP, _TOPIC = 3, 2, 5, 6  # features of each
_P_CHILD, _P_GRANDCHILD = 0.35, 0.4  # where the parent is active
_P_TOPIC = 0.1  # of a document to have a topic
_CORRELATION = 0.75  # of the normal variables behind the features of a group
_MEAN, _STD = 3.0, 0.5  # of magnitudes


class _Features(NamedTuple):
    """The features: how often each is drawn, and what else decides whether it is active."""

    p: list[float]
    topic: list[int]  # −1: any document
    group: list[int]  # of correlated features, −1: none
    roots: list[HierarchyNode]


def hard_model(seed: int, device: str = "cpu") -> SyntheticModel:
    """The world whose features' directions are drawn with this seed."""
    features = _features()
    n = len(features.p)
    in_group = torch.tensor(features.group) >= 0
    factor = torch.zeros(n, _N_GROUPS)
    factor[in_group, torch.tensor(features.group)[in_group]] = _CORRELATION**0.5
    diagonal = 1 - factor.pow(2).sum(1)
    correlation = LowRankCorrelationMatrix(factor.to(device), diagonal.to(device))
    topic = torch.tensor(features.topic, device=device)

    def in_documents(
        feature_acts: Float[torch.Tensor, "batch n_features"],
    ) -> Float[torch.Tensor, "batch n_features"]:
        """Silence the features of topics that a document does not have."""
        n_documents = -(-len(feature_acts) // DOCUMENT)
        has_topic = torch.rand(n_documents, _N_TOPICS + 1, device=feature_acts.device) < _P_TOPIC
        has_topic[:, -1] = True  # of the features without a topic
        of_rows = has_topic.repeat_interleave(DOCUMENT, dim=0)[: len(feature_acts)]
        return feature_acts * of_rows[:, topic]

    with_parents = hierarchy_modifier(features.roots)
    generator = ActivationGenerator(
        n,
        torch.tensor(features.p),
        std_firing_magnitudes=_STD,
        mean_firing_magnitudes=_MEAN,
        modify_activations=[in_documents, with_parents],
        correlation_matrix=correlation,
        device=device,
    )
    directions = FeatureDictionary(
        n,
        D_IN,
        bias=False,
        initializer=orthogonal_initializer(num_steps=100, lr=3e-4),
        device=device,
        seed=seed,
    )
    return SyntheticModel(
        SyntheticModelConfig(n, D_IN, bias=False, seed=seed),
        feature_dict=directions,
        activation_generator=generator,
        hierarchy=Hierarchy(features.roots, with_parents),
        device=device,
    )


def _features() -> _Features:
    features = _Features([], [], [], [])

    def add(p: float, topic: int = -1, group: int = -1) -> int:
        features.p.append(p)
        features.topic.append(topic)
        features.group.append(group)
        return len(features.p) - 1

    for p in _between(0.3, 0.5, _N_DENSE):
        add(p)
    for i, p in enumerate(_between(0.02, 0.08, _N_TREES)):
        # as frequent over all documents, whether or not in some alone
        root = HierarchyNode(add(p / _P_TOPIC, i % _N_TOPICS) if i % 2 else add(p))
        children = []
        for _ in range(_CHILDREN):
            child = HierarchyNode(add(_P_CHILD))
            child.children = [HierarchyNode(add(_P_GRANDCHILD)) for _ in range(_GRANDCHILDREN)]
            children.append(child)
        root.children = children
        features.roots.append(root)
    for group in range(_N_GROUPS):
        for p in _between(0.01, 0.04, _GROUP):
            add(p, group=group)
    for topic in range(_N_TOPICS):
        for p in _between(0.1, 0.7, _TOPIC):
            add(p, topic)
    for p in _between(0.0005, 0.003, _N_RARE):
        add(p)
    return features


def _between(first: float, last: float, n: int) -> list[float]:
    return torch.linspace(first, last, n).tolist()


HARD = Benchmark(
    name="hard",
    build=hard_model,
    d_in=D_IN,
    d_sae=384,
    matryoshka_widths=(24, 72, 168, 384),
    k=10,
    lr=1e-3,
    batch_size=256,
)
