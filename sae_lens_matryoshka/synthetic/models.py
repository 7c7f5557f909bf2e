"""The benchmarks: synthetic activations with known features and a known feature hierarchy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    Hierarchy,
    HierarchyConfig,
    HierarchyNode,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    orthogonal_initializer,
)

# The toy's features: each parent is followed by its children; the others are independent.
TOY_PARENTS, TOY_CHILDREN = [0, 4, 8], 3
_N_FEATURES, _N_TREE = 20, 12
_P_PARENT, _P_CHILD, _P_INDEPENDENT = 0.15, 0.2, 0.05


@dataclass(frozen=True)
class Benchmark:
    """A model of activations, and the default settings for training SAEs on it."""

    name: str
    build: Callable[[int, str], SyntheticModel]  # from a seed and a device
    d_in: int
    d_sae: int
    matryoshka_widths: tuple[int, ...]
    k: float  # mean number of active latents of the BatchTopK SAEs
    lr: float  # Adam's, constant
    n_samples: int = 2_000_000  # activations to train on
    batch_size: int = 1024
    l1_coefficient: float = 1.0
    n_scoring_samples: int = 100_000  # held-out activations to score on
    # the SAEs to compare, as `variants.base_config` names them
    variants: tuple[str, ...] = ("batchtopk", "matryoshka_batchtopk", "matryoshka")


def toy_model(seed: int, device: str = "cpu") -> SyntheticModel:
    """The tree of Bussmann et al. (arXiv 2503.17547, section 4.1), as released in their code.

    20 features in 20 dimensions: 3 parents (p 0.15), each with 3 mutually exclusive children (p 0.2
    each where the parent is active), and 8 independent features (p 0.05). On average 1.12 are
    active; the paper's text says 1.2338, which its tree does not give. Magnitudes are 1, directions
    are random, of this seed, and orthogonal.
    """
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(_N_FEATURES, _N_FEATURES, generator=generator))
    features = FeatureDictionary(_N_FEATURES, _N_FEATURES, initializer=None, device=device)
    features.feature_vectors.data = directions.to(device)

    p = torch.full((_N_FEATURES,), _P_INDEPENDENT)
    p[:_N_TREE] = 0  # `_with_children` draws the children; other values would shift the stream
    p[TOY_PARENTS] = _P_PARENT
    roots = [
        HierarchyNode(
            feature_index=parent,
            children=[HierarchyNode(parent + i) for i in range(1, TOY_CHILDREN + 1)],
            mutually_exclusive_children=True,
        )
        for parent in TOY_PARENTS
    ]
    return SyntheticModel(
        SyntheticModelConfig(_N_FEATURES, _N_FEATURES, bias=False, seed=seed),
        feature_dict=features,
        activation_generator=ActivationGenerator(
            _N_FEATURES, p, modify_activations=_with_children, device=device
        ),
        hierarchy=Hierarchy(roots, _with_children),
        device=device,
    )


def _with_children(
    feature_acts: Float[torch.Tensor, "batch n_features"],
) -> Float[torch.Tensor, "batch n_features"]:
    """Activate at most one child of each active parent, in place.

    SAELens draws children independently and then drops all but one, which makes each child rarer
    than its probability.
    """
    shape = (len(feature_acts), len(TOY_PARENTS))
    which = torch.rand(shape, device=feature_acts.device) // _P_CHILD  # ≥ 3: no child
    parents = torch.tensor(TOY_PARENTS, device=feature_acts.device)
    for i in range(TOY_CHILDREN):
        feature_acts[:, parents + 1 + i] = feature_acts[:, parents] * (which == i)
    return feature_acts


def synthsaebench_config(*, n_features: int, d_in: int, n_roots: int) -> SyntheticModelConfig:
    """SynthSAEBench at any size, with the settings of its second version."""
    return SyntheticModelConfig(
        num_features=n_features,
        hidden_dim=d_in,
        firing_probability=ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4, min_prob=5e-4
        ),
        hierarchy=HierarchyConfig(
            total_root_nodes=n_roots,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42,
    )


def synthsaebench_model(seed: int, device: str = "cpu", **size: int) -> SyntheticModel:
    """The model of `synthsaebench_config(**size)`; CPU and CUDA draw different features.

    It does not depend on `seed`: the benchmark is one model, with a fixed seed in its config.
    """
    cfg = synthsaebench_config(**size)
    assert cfg.orthogonalization is not None
    # the same dictionary as SAELens', without a progress bar
    features = FeatureDictionary(
        cfg.num_features,
        cfg.hidden_dim,
        bias=cfg.bias,
        initializer=orthogonal_initializer(**cfg.orthogonalization.to_dict()),
        device=device,
        seed=cfg.seed,
    )
    return SyntheticModel(cfg, feature_dict=features, device=device)


def parents_of(model: SyntheticModel) -> Int[torch.Tensor, " n_features"]:
    """The parent of each true feature, −1 where it has none."""
    parents = torch.full((model.cfg.num_features,), -1)
    nodes = list(model.hierarchy.roots) if model.hierarchy else []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        for child in node.children:
            if child.feature_index is not None and node.feature_index is not None:
                parents[child.feature_index] = node.feature_index
    return parents


TOY = Benchmark(
    name="toy",
    build=toy_model,
    d_in=20,
    d_sae=20,
    matryoshka_widths=(2, 4, 6, 8, 10, 12, 14, 16, 18, 20),
    k=1.12,
    lr=3e-3,
    l1_coefficient=0.1,
    variants=("l1", "batchtopk", "matryoshka"),
)
SYNTHSAEBENCH = {
    "small": Benchmark(
        name="synthsaebench-small",
        build=partial(synthsaebench_model, n_features=2000, d_in=256, n_roots=16),
        d_in=256,
        d_sae=512,
        matryoshka_widths=(16, 64, 256, 512),
        k=8,
        lr=1e-3,
        batch_size=256,  # at 1,024, too few steps to find most features
    ),
    "full": Benchmark(
        name="synthsaebench-full",
        build=partial(synthsaebench_model, n_features=16384, d_in=768, n_roots=128),
        d_in=768,
        d_sae=4096,
        matryoshka_widths=(128, 512, 2048, 4096),
        k=25,
        lr=3e-4,
        n_samples=200_000_000,
        n_scoring_samples=500_000,
    ),
}
