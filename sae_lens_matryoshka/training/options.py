"""The options of the nested objective, shared by every architecture (for k see `schedules`)."""

# Not `from __future__ import annotations`: SAELens' command line (simple_parsing) would resolve the
# annotations in the module of the subclass.

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from sae_lens import TrainingSAEConfig
from sae_lens.constants import DTYPE_MAP
from simple_parsing import field as command_line_field  # takes a list on SAELens' command line
from typing_extensions import override

from sae_lens_matryoshka.kernels.dispatch import Implementation
from sae_lens_matryoshka.kernels.sums import StopGradient
from sae_lens_matryoshka.kernels.triton_support import TRITON_DTYPES, why_no_triton
from sae_lens_matryoshka.training.prefixes import PrefixSampling, sample_prefixes
from sae_lens_matryoshka.training.schedules import linear
from sae_lens_matryoshka.training.widths import resolve_widths
from sae_lens_matryoshka.util.checks import (
    checked_count,
    checked_number,
    invalid_option,
    is_number,
)

LatentOrder = Literal["index", "frequency"]
DecoderNorm = Literal["free", "unit", "unit_at_update"]

# SAELens computes these from each batch, and forbids them together with the auxiliary loss
_PER_ROW_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
_LARGEST_LOG = 80.0  # of a weight that is still a finite float32
_DEFAULT_N_PREFIXES = 10  # noanabeshima/matryoshka-saes


@dataclass(kw_only=True)
class NestedOptions(TrainingSAEConfig):
    """Options of the nested objective; the defaults are the paper's (arXiv 2503.17547)."""

    matryoshka_widths: list[int] = field(default_factory=list)
    """Width of each level, strictly increasing, as in SAELens; if `d_sae` is missing at the end, it
    is added with a warning. If empty, the paper's split of `d_sae`: 1/32, 3/32, 7/32, 15/32 and 1
    (section 4). With sampled prefixes, the levels that are measured, and those of the saved SAE."""

    level_weights: list[float] | float = command_line_field(  # noqa: RUF009
        default=1.0, nargs="+", type=float, required=False
    )
    """Weight c_p of each level's squared error in the loss: a list, innermost level first; or one
    number β, the outermost level having weight 1, the next one inwards β, then β², … (Chanin et
    al., arXiv 2505.11756)."""

    stop_gradient: StopGradient = "none"
    """Which losses reach a latent. "none": those of all levels that contain it (the paper). "all":
    only that of its own level, the first that contains it (the paper's appendix G). "inner": that
    of its own level and that of the whole SAE (Chanin's variants on SynthSAEBench). b_dec always
    learns from all levels."""

    prefix_sampling: PrefixSampling = "fixed"
    """"fixed" levels, or `n_prefixes` of them drawn anew at each step without replacement, the last
    always d_sae. The density over the prefix length l is constant ("uniform"), or falls as 1/l
    ("log_uniform"), as 1/√l ("inverse_sqrt": what noanabeshima/matryoshka-saes calls Pareto with
    power 0.5) or as l^-3/2 ("pareto": the Pareto distribution of shape 0.5, as in
    OSU-NLP-Group/saev)."""

    n_prefixes: int | None = None
    """Number of prefixes to draw, d_sae included; if None, 10, or as many as there are."""

    min_prefix: int = 1
    """The shortest prefix that may be drawn."""

    prefix_seed: int = 0
    """The prefixes depend on this and the step alone, so processes and resumed runs draw alike. In
    runs of `sae-matryoshka train`, the default is the run's `seed`."""

    latent_order: LatentOrder = "index"
    """What orders the latents into levels: their "index", or the "frequency" with which they fire,
    the most frequent innermost, as a moving average over training (Chanin's variants on
    SynthSAEBench; noanabeshima orders by importance). Saved SAEs have their latents in level order,
    and so have checkpoints of `MatryoshkaTrainingRunner` and the command line; with SAELens' own
    runner, checkpoints and `sparsity.safetensors` keep the order of training."""

    bias_level: bool = False
    """Whether b_dec alone is one more level, inside all others, as in bartbussmann/matryoshka_sae.
    In a list of `level_weights`, its weight comes first."""

    inner_weight_end: float = 1.0
    """Factor of the weights of all levels but the outermost at the end of training: nest first,
    then let the whole SAE reconstruct. Not published; docs/variants.md shows what it does."""

    inner_fade_start: int = 0
    """Step at which these weights begin to fade."""

    inner_fade_steps: int = 0
    """Steps over which they fade, linearly."""

    decoder_norm: DecoderNorm = "free"
    """"free", as in SAELens; "unit": decoder rows have norm 1 in every forward pass, and their
    gradient has no component along them (dictionary_learning); "unit_at_update": they are set to
    norm 1 just before each update, which may change it (bartbussmann/matryoshka_sae)."""

    encoder_bias: bool = True
    """Whether b_enc is trained; otherwise it stays 0 (bartbussmann/matryoshka_sae)."""

    implementation: Implementation = "auto"
    """What computes a training step; the numbers are the same. "reference" is dense and reads like
    the paper; "sparse" touches only the codes that are kept, in PyTorch; "triton" does the same in
    CUDA kernels, for parameters of at most 32 bits. "auto" takes "triton" on CUDA where Triton is
    installed, else "sparse", or "reference" where neither applies."""

    @override
    def __post_init__(self) -> None:
        self._check_options()
        super().__post_init__()

    def _check_options(self) -> None:
        """Check the options, and fill in those that were left out."""
        if self.dtype not in DTYPE_MAP:
            raise invalid_option("dtype", self.dtype, f"one of {', '.join(DTYPE_MAP)}")
        for name in ("d_in", "d_sae"):
            setattr(self, name, checked_count(name, getattr(self, name), 1))
        for name, choices in (
            ("stop_gradient", StopGradient),
            ("prefix_sampling", PrefixSampling),
            ("latent_order", LatentOrder),
            ("decoder_norm", DecoderNorm),
            ("implementation", Implementation),
        ):
            if getattr(self, name) not in get_args(choices):
                accepted = f"one of {', '.join(map(repr, get_args(choices)))}"
                raise invalid_option(name, getattr(self, name), accepted)
        for name in ("bias_level", "encoder_bias"):
            if not isinstance(getattr(self, name), bool):
                raise invalid_option(name, getattr(self, name), "true or false")
        self.matryoshka_widths = resolve_widths(self.matryoshka_widths, self.d_sae)
        self._check_prefixes()
        self._check_weights()
        self._check_fading()
        if self.latent_order == "frequency" and self.dtype not in ("float32", "float64"):
            raise invalid_option(
                "latent_order",
                "frequency",
                f"dtype 'float32' or 'float64' with it: dtype={self.dtype!r} is too coarse for how "
                "often latents fire",
            )
        if self.normalizes_per_row:
            self._check_normalization()
        if self.implementation == "triton":
            self._check_triton()

    def _check_prefixes(self) -> None:
        self.prefix_seed = checked_count("prefix_seed", self.prefix_seed, 0)
        self.min_prefix = checked_count("min_prefix", self.min_prefix, 1)
        if self.n_prefixes is not None:
            self.n_prefixes = checked_count("n_prefixes", self.n_prefixes, 1)
        if not self.is_sampled:
            for name, default in (("n_prefixes", None), ("min_prefix", 1)):
                if getattr(self, name) != default:
                    raise invalid_option(
                        name,
                        getattr(self, name),
                        "it only with a prefix_sampling other than 'fixed', where "
                        "matryoshka_widths are the levels",
                    )
            return
        if self.min_prefix > self.d_sae:
            raise invalid_option("min_prefix", self.min_prefix, f"1 to d_sae={self.d_sae}")
        most = self.d_sae - self.min_prefix + 1
        if self.n_prefixes is not None and self.n_prefixes > most:
            raise invalid_option(
                "n_prefixes",
                self.n_prefixes,
                f"1 to {most}, the number of lengths from min_prefix={self.min_prefix} to "
                f"d_sae={self.d_sae}",
            )

    def _check_weights(self) -> None:
        weights, n_levels = self.level_weights, self.n_levels
        if isinstance(weights, list) and len(weights) == 1 < n_levels:
            [weights] = weights  # a command line gives one number as a list
        if is_number(weights):
            accepted = "a number β above 0, or a list of one weight per level"
            self.level_weights = checked_number("level_weights", weights, accepted, above=0)
            if n_levels * math.log(max(weights, 1 / weights)) > _LARGEST_LOG:
                accepted = f"a number nearer to 1 for {n_levels} levels"
                raise invalid_option("level_weights", weights, accepted)
            return
        if (
            not isinstance(weights, list | tuple)
            or len(weights) != n_levels
            or not all(is_number(weight) and weight >= 0 for weight in weights)
            or not any(weights)
        ):
            accepted = (
                f"a number β above 0, or a list of {n_levels} weights of 0 or more, not all 0"
            )
            raise invalid_option("level_weights", weights, accepted)
        self.level_weights = [float(weight) for weight in weights]

    def _check_fading(self) -> None:
        for name in ("inner_fade_start", "inner_fade_steps"):
            setattr(self, name, checked_count(name, getattr(self, name), 0))
        self.inner_weight_end = checked_number(
            "inner_weight_end",
            self.inner_weight_end,
            "a number from 0 to 1 (the weights start at 1)",
            least=0,
            most=1,
        )
        scheduled = [n for n in ("inner_fade_start", "inner_fade_steps") if getattr(self, n)]
        if self.inner_weight_end == 1 and scheduled:
            name = scheduled[0]
            accepted = "it only with an inner_weight_end below 1"
            raise invalid_option(name, getattr(self, name), accepted)
        if self.inner_weight_end < 1 and not scheduled:
            raise invalid_option(
                "inner_weight_end",
                self.inner_weight_end,
                "it only with inner_fade_start or inner_fade_steps; level_weights are for "
                "the whole run",
            )

    def _check_normalization(self) -> None:
        coefficient = getattr(self, "aux_loss_coefficient", 0)  # JumpReLU has none
        if coefficient != 0:
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} is not accepted together "
                f"with aux_loss_coefficient={coefficient}: SAELens' auxiliary loss takes 'none', "
                "'expected_average_only_in' or 'covariance_whitening', or set "
                "aux_loss_coefficient=0."
            )
        if self.implementation in ("sparse", "triton"):
            raise ValueError(
                f"implementation={self.implementation!r} is not accepted together with "
                f"normalize_activations={self.normalize_activations!r}: give 'auto' or 'reference'."
            )

    def _check_triton(self) -> None:
        reason = why_no_triton()
        if reason is not None:
            raise ValueError(
                f"implementation='triton' is not accepted on this machine, because {reason}: give "
                "'auto', 'sparse' or 'reference' (in cfg.json, for another machine's checkpoint)."
            )
        if DTYPE_MAP[self.dtype] not in TRITON_DTYPES:
            raise ValueError(
                f"implementation='triton' is not accepted together with dtype={self.dtype!r}: give "
                "'auto', 'sparse' or 'reference', or dtype 'float32', 'bfloat16' or 'float16'."
            )

    @property
    def is_sampled(self) -> bool:
        """Whether the prefixes are drawn anew at each step."""
        return self.prefix_sampling != "fixed"

    @property
    def n_levels(self) -> int:
        """Number of levels in a step's loss, that of b_dec alone included."""
        n = len(self.matryoshka_widths)
        if self.is_sampled:
            n = self.n_prefixes or min(_DEFAULT_N_PREFIXES, self.d_sae - self.min_prefix + 1)
        return n + self.bias_level

    @property
    def normalizes_per_row(self) -> bool:
        """Whether each activation is normalised by its own statistics, and denormalised after."""
        return self.normalize_activations in _PER_ROW_NORMALIZATIONS

    def prefixes_at(self, step: int) -> list[int]:
        """Prefix lengths of the levels of a step's loss, ascending; 0 is that of b_dec alone."""
        prefixes = self.matryoshka_widths
        if self.is_sampled:
            prefixes = sample_prefixes(
                self.prefix_sampling,
                self.n_levels - self.bias_level,
                self.min_prefix,
                self.d_sae,
                (self.prefix_seed, step),
            )
        return [0, *prefixes] if self.bias_level else list(prefixes)

    def weights_at(self, step: int) -> list[float]:
        """c_p of each level of a step's loss, in the order of `prefixes_at`."""
        if isinstance(self.level_weights, list):
            weights = self.level_weights
        else:
            weights = [self.level_weights**depth for depth in reversed(range(self.n_levels))]
        factor = linear(
            1.0, self.inner_weight_end, step - self.inner_fade_start, self.inner_fade_steps
        )
        return [*(factor * weight for weight in weights[:-1]), weights[-1]]
