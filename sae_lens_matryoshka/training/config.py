"""The configs of this package's architectures, each option with its default and its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from typing_extensions import override

from sae_lens_matryoshka.kernels.selection import Selection
from sae_lens_matryoshka.training.diagnosis import check_baseline
from sae_lens_matryoshka.training.options import NestedOptions
from sae_lens_matryoshka.training.schedules import SparsitySchedule
from sae_lens_matryoshka.util.checks import checked_count, invalid_option


@dataclass
class MatryoshkaTrainingSAEConfig(NestedOptions, SparsitySchedule, BatchTopKTrainingSAEConfig):
    """Options of a Matryoshka BatchTopK SAE (Bussmann et al., arXiv 2503.17547).

    Inherited fields keep SAELens' meaning: `k` (mean number of active latents per token, may be
    fractional), `aux_loss_coefficient`, `rescale_acts_by_decoder_norm`, `topk_threshold_lr`,
    `normalize_activations`, `decoder_init_norm`, `dtype` and the rest. `use_sparse_activations` is
    ignored, as in SAELens' BatchTopK: `implementation` decides. See `options.NestedOptions` for the
    nested objective and `schedules.SparsitySchedule` for the schedule of k.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """

    use_matryoshka_aux_loss: bool = False
    """Whether the dead latents of each level reconstruct the residual of their own level, instead
    of that of the whole SAE (SAELens)."""

    topk_threshold_start_step: int | None = None
    """Step after which `topk_threshold` follows the cut, starting from the first cut it sees
    (dictionary_learning). If None, from the first step on, starting from 0 (SAELens). The saved
    SAE's threshold is calibrated either way."""

    selection: Selection = "auto"
    """How the codes are found; the set is the same. "product": from all pre-activations. "screen":
    a product in bfloat16 rules out most scores, and only the rest are computed in float32 (the
    parameters' dtype; without autocast, on a CPU or in Triton). "auto" takes the screen where it is
    faster. On a CPU: for 2^19 encoder weights or more, if the processor multiplies at least twice
    as fast in bfloat16; that is measured, so runs on processors near this limit may differ by
    rounding. On CUDA: for B * d_in * d_sae of 2^35 or more, from compute capability 8.0, unless
    PyTorch is told to multiply in TF32."""

    baseline_explained_variance: float | None = None
    """Variance explained of a BatchTopK SAE of this width and k, above 0 and at most 1, if known:
    training warns if the SAE ends up far below."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_threshold_start_step is not None:
            self.topk_threshold_start_step = checked_count(
                "topk_threshold_start_step", self.topk_threshold_start_step, 0
            )
        if self.selection not in get_args(Selection):
            accepted = f"one of {', '.join(map(repr, get_args(Selection)))}"
            raise invalid_option("selection", self.selection, accepted)
        name, baseline = "baseline_explained_variance", self.baseline_explained_variance
        if baseline is not None:
            self.baseline_explained_variance = check_baseline(name, baseline)
            if self.is_sampled:
                raise invalid_option(
                    name,
                    baseline,
                    "it only with prefix_sampling='fixed': runs with sampled prefixes are "
                    "not monitored; `sae-matryoshka levels --diagnose` judges their SAE",
                )

    @classmethod
    def recommended(
        cls, d_in: int, d_sae: int, k: float, n_steps: int, **options: Any
    ) -> MatryoshkaTrainingSAEConfig:
        """The options that recovered true features best on the small SynthSAEBench.

        The most frequent latents make up the inner levels, a latent learns from its own level and
        the outermost one, and k falls from twice its value over the first half of the run (all
        three are among Chanin's variants on SynthSAEBench). docs/results/synthsaebench.md shows
        what this gains, and on which data. On a small language model it absorbs less at k 6,
        and at k 24 finds more edges of the tree and explains a point less of the variance than the
        defaults (docs/results/smollm2.md).

        Args:
            d_in: Width of the activations.
            d_sae: Number of latents.
            k: Mean number of active latents per activation.
            n_steps: Training steps of the run.
            options: Any other field of the config; they take precedence over the recipe.

        Raises:
            ValueError: naming the field, its value and what is accepted.
        """
        n_steps = checked_count("n_steps", n_steps, 2)
        recipe: dict[str, Any] = {
            "latent_order": "frequency",
            "stop_gradient": "inner",
            "k_start": min(2 * k, d_sae),
            "k_anneal_steps": n_steps // 2,
        }
        if options.get("k_start", k) is None:
            del recipe["k_anneal_steps"]
        return cls(d_in=d_in, d_sae=d_sae, k=k, **{**recipe, **options})


@dataclass
class MatryoshkaTopKTrainingSAEConfig(NestedOptions, SparsitySchedule, TopKTrainingSAEConfig):
    """Options of a Matryoshka TopK SAE: the nested objective on SAELens' TopK training SAE.

    As `MatryoshkaTrainingSAEConfig`, with exactly `k` latents active on each token; a scheduled k
    is rounded to an integer. Saved, it is a TopK SAE of SAELens.
    """

    k_is_integer: ClassVar[bool] = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass
class MatryoshkaJumpReLUTrainingSAEConfig(NestedOptions, JumpReLUTrainingSAEConfig):
    """Options of a Matryoshka JumpReLU SAE, as in Gemma Scope 2.

    The nested objective on SAELens' JumpReLU training SAE, whose sparsity loss covers the whole
    dictionary. `jumprelu_sparsity_loss_mode="quadratic"` with `target_l0` is Gemma Scope 2's.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_jumprelu"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig
