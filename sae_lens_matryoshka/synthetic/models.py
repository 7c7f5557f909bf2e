"""The benchmarks: synthetic activations whose features and feature hierarchy are known."""

from __future__ import annotations

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

# The toy tree: parents, children of each, and features outside the tree, with their probabilities.
_N_PARENTS, _N_CHILDREN, _N_INDEPENDENT = 3, 3, 8
_P_PARENT, _P_CHILD, _P_INDEPENDENT = 0.15, 0.2, 0.05
_N_TREE = _N_PARENTS * (1 + _N_CHILDREN)
_PARENTS = list(range(0, _N_TREE, 1 + _N_CHILDREN))


@dataclass(frozen=True)
class Benchmark:
    """A model of activations, and the default settings for training SAEs on it."""

    name: str
    build: Callable[[int, str], SyntheticModel]  # makes the model from a seed and a device
    d_in: int
    d_sae: int
    matryoshka_widths: tuple[int, ...]
    k: float  # mean number of active latents of the BatchTopK SAEs
    l1_coefficient: float
    n_samples: int  # activations to train on
    batch_size: int
    lr: float  # Adam's, constant
    n_scoring_samples: int  # held-out activations to score on
    variants: tuple[str, ...]  # the SAEs to compare; see `variants.base_config`


def toy_model(seed: int, device: str = "cpu") -> SyntheticModel:
    """The tree of Bussmann et al. (arXiv 2503.17547, section 4.1), as released in their code.

    20 features in 20 dimensions: 3 parents (p 0.15), each with 3 mutually exclusive children (p 0.2
    each where the parent is active), and 8 independent features (p 0.05). On average 1.12 are
    active; the paper's text says 1.2338, which its tree does not give. Magnitudes are 1, directions
    are random and orthogonal.

    Args:
        seed: Of the directions.
        device: Where samples are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    n_features = _N_TREE + _N_INDEPENDENT
    directions, _ = torch.linalg.qr(torch.randn(n_features, n_features, generator=generator))
    features = FeatureDictionary(n_features, n_features, device=device)
    features.feature_vectors.data = directions.to(device)

    p = torch.full((n_features,), _P_INDEPENDENT)
    p[:_N_TREE] = 0  # children are drawn by `_with_children`
    p[_PARENTS] = _P_PARENT
    roots = [
        HierarchyNode(
            feature_index=parent,
            children=[HierarchyNode(parent + i) for i in range(1, _N_CHILDREN + 1)],
            mutually_exclusive_children=True,
        )
        for parent in _PARENTS
    ]
    return SyntheticModel(
        SyntheticModelConfig(n_features, n_features, bias=False, seed=seed),
        feature_dict=features,
        activation_generator=ActivationGenerator(
            n_features, p, modify_activations=_with_children, device=device
        ),
        hierarchy=Hierarchy(roots, _with_children),
        device=device,
    )


def _with_children(
    feature_acts: Float[torch.Tensor, "batch n_features"],
) -> Float[torch.Tensor, "batch n_features"]:
    """Activate at most one child of each active parent, in place.

    SAELens draws children independently and then drops the surplus, which makes each child rarer
    than its probability.
    """
    n = len(feature_acts)
    which = torch.rand(n, _N_PARENTS, device=feature_acts.device) // _P_CHILD  # ≥ 3: no child
    parents = torch.tensor(_PARENTS, device=feature_acts.device)
    for i in range(_N_CHILDREN):
        feature_acts[:, parents + 1 + i] = feature_acts[:, parents] * (which == i)
    return feature_acts


def synthsaebench_config(*, n_features: int, d_in: int, n_roots: int) -> SyntheticModelConfig:
    """SynthSAEBench with the settings of its second version, at any size.

    Args:
        n_features: True features.
        d_in: Dimension of the activations.
        n_roots: Root features, each of one tree.
    """
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
    """The model of `synthsaebench_config`.

    Args:
        seed: Not used: the benchmark is this one model, with the seed in its config.
        device: Where it is made. CPU and CUDA draw different features from the same seed.
        size: The arguments of `synthsaebench_config`.
    """
    cfg = synthsaebench_config(**size)
    assert cfg.orthogonalization is not None
    # SAELens would make the same dictionary, and show a progress bar.
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

    def visit(node: HierarchyNode) -> None:
        for child in node.children:
            if child.feature_index is not None and node.feature_index is not None:
                parents[child.feature_index] = node.feature_index
            visit(child)

    for root in model.hierarchy.roots if model.hierarchy else []:
        visit(root)
    return parents


TOY = Benchmark(
    name="toy",
    build=toy_model,
    d_in=20,
    d_sae=20,
    matryoshka_widths=(2, 4, 6, 8, 10, 12, 14, 16, 18, 20),
    k=1.12,
    l1_coefficient=0.1,
    n_samples=2_000_000,
    batch_size=1024,
    lr=3e-3,
    n_scoring_samples=100_000,
    variants=("l1", "batchtopk", "matryoshka"),
)
_SYNTHSAEBENCH_VARIANTS = ("batchtopk", "matryoshka_batchtopk", "matryoshka")
SYNTHSAEBENCH = {
    "small": Benchmark(
        name="synthsaebench-small",
        build=partial(synthsaebench_model, n_features=2000, d_in=256, n_roots=16),
        d_in=256,
        d_sae=512,
        matryoshka_widths=(16, 64, 256, 512),
        k=8,
        l1_coefficient=1.0,
        n_samples=2_000_000,
        batch_size=256,  # at 1,024, too few steps to find most features
        lr=1e-3,
        n_scoring_samples=100_000,
        variants=_SYNTHSAEBENCH_VARIANTS,
    ),
    "full": Benchmark(
        name="synthsaebench-full",
        build=partial(synthsaebench_model, n_features=16384, d_in=768, n_roots=128),
        d_in=768,
        d_sae=4096,
        matryoshka_widths=(128, 512, 2048, 4096),
        k=25,
        l1_coefficient=1.0,
        n_samples=200_000_000,
        batch_size=1024,
        lr=3e-4,
        n_scoring_samples=500_000,
        variants=_SYNTHSAEBENCH_VARIANTS,
    ),
}
