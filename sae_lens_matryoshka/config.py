"""The options of the architecture `"matryoshka"`, each with its default and its source."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Literal, get_args

from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.constants import DTYPE_MAP
from typing_extensions import override

from sae_lens_matryoshka.diagnosis import check_baseline
from sae_lens_matryoshka.prefixes import resolve_widths

Implementation = Literal["auto", "reference", "sparse"]

# SAELens keeps per-batch statistics for these two and forbids them beside the auxiliary loss.
_PER_ROW_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")


@dataclass
class MatryoshkaTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Options of a Matryoshka BatchTopK SAE (Bussmann et al., arXiv 2503.17547).

    Every inherited field keeps SAELens' meaning: `k` (mean number of active latents per token, may
    be fractional), `aux_loss_coefficient`, `rescale_acts_by_decoder_norm`, `topk_threshold_lr`,
    `normalize_activations`, `decoder_init_norm`, `dtype` and the rest. `use_sparse_activations` is
    ignored, as in SAELens' BatchTopK: `implementation` decides.

    Args:
        matryoshka_widths: Width of each nested level, strictly increasing, as in SAELens. A missing
            last width `d_sae` is added with a warning. Left out: the paper's split of `d_sae`,
            1/32, 3/32, 7/32, 15/32 and 1 (section 4).
        use_matryoshka_aux_loss: Let the dead latents of each level reconstruct the error of their
            own level, instead of the error of the whole SAE (SAELens).
        implementation: How a training step is computed; the numbers are the same. "reference" is
            dense and reads like the paper; "sparse" touches only the codes that BatchTopK keeps;
            "auto" takes "sparse" wherever it applies.
        baseline_explained_variance: Variance explained of a BatchTopK SAE of this width and k,
            above 0 and at most 1, if known: training warns if it ends up far below.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """

    matryoshka_widths: list[int] = field(default_factory=list)
    use_matryoshka_aux_loss: bool = False
    implementation: Implementation = "auto"
    baseline_explained_variance: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka"

    @override
    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}={value!r} is not accepted: give a positive integer.")
            setattr(self, name, int(value))  # numpy's integers could not be saved as JSON
        if (
            isinstance(self.k, bool)
            or not isinstance(self.k, numbers.Real)
            or not math.isfinite(self.k)
            or not 0 < self.k <= self.d_sae
        ):
            raise ValueError(
                f"k={self.k!r} is not accepted: give a number above 0 and at most "
                f"d_sae={self.d_sae}."
            )
        self.k = int(self.k) if isinstance(self.k, numbers.Integral) else float(self.k)
        if self.dtype not in DTYPE_MAP:
            raise ValueError(
                f"dtype={self.dtype!r} is not accepted: give one of {', '.join(DTYPE_MAP)}."
            )
        if self.implementation not in get_args(Implementation):
            raise ValueError(
                f"implementation={self.implementation!r} is not accepted: give one of "
                f"{', '.join(map(repr, get_args(Implementation)))}."
            )
        if self.baseline_explained_variance is not None:
            check_baseline("baseline_explained_variance", self.baseline_explained_variance)
        if self.normalizes_per_row:
            if self.aux_loss_coefficient != 0:
                raise ValueError(
                    f"normalize_activations={self.normalize_activations!r} is not accepted beside "
                    f"aux_loss_coefficient={self.aux_loss_coefficient}: SAELens' auxiliary loss "
                    "takes 'none', 'expected_average_only_in' or 'covariance_whitening', or set "
                    "aux_loss_coefficient=0."
                )
            if self.implementation == "sparse":
                raise ValueError(
                    f"implementation='sparse' is not accepted beside normalize_activations="
                    f"{self.normalize_activations!r}: give 'auto' or 'reference'."
                )
        self.matryoshka_widths = resolve_widths(self.matryoshka_widths, self.d_sae)
        super().__post_init__()

    @property
    def normalizes_per_row(self) -> bool:
        """Whether each activation is normalised by its own statistics, and denormalised after."""
        return self.normalize_activations in _PER_ROW_NORMALIZATIONS
