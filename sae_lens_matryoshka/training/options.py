"""The options of the nested objective that every architecture of this package shares."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sae_lens.constants import DTYPE_MAP
from simple_parsing import field as command_line_field  # to give a list on a command line

from sae_lens_matryoshka.kernels.triton_support import TRITON_DTYPES, why_no_triton
from sae_lens_matryoshka.training.prefixes import PrefixSampling, sample_prefixes
from sae_lens_matryoshka.training.widths import resolve_widths
from sae_lens_matryoshka.util.checks import checked_count, invalid_option, is_number

Implementation = Literal["auto", "reference", "sparse", "triton"]
StopGradient = Literal["none", "all", "inner"]
LatentOrder = Literal["index", "frequency"]
DecoderNorm = Literal["free", "unit", "unit_at_update"]

# SAELens keeps per-batch statistics for these two and forbids them beside the auxiliary loss.
_PER_ROW_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
_LARGEST_LOG = 80.0  # of a weight that is still a finite float32
_DEFAULT_N_PREFIXES = 10  # noanabeshima/matryoshka-saes


@dataclass(kw_only=True)
class NestedOptions:
    """Options of the nested objective; the defaults are the paper's (arXiv 2503.17547).

    Args:
        matryoshka_widths: Width of each nested level, strictly increasing, as in SAELens. A missing
            last width `d_sae` is added with a warning. Left out: the paper's split of `d_sae`,
            1/32, 3/32, 7/32, 15/32 and 1 (section 4). With sampled prefixes, the levels that are
            measured, and those of the saved SAE.
        level_weights: c_p, the weight of each level's squared error in the loss. A list, innermost
            level first; or one number β, which compounds from the outermost level, of weight 1,
            inwards: β, β², … (Chanin et al., arXiv 2505.11756). Equal weights are β = 1.
        stop_gradient: What the losses of outer levels may change of inner latents. "none":
            everything (the paper). "all": nothing, each latent learns from the loss of its own
            level (the paper's appendix G). "inner": only the outermost level's loss reaches further
            in (Chanin's variants on SynthSAEBench). b_dec learns from all levels always.
        prefix_sampling: "fixed" levels, or n_prefixes of them drawn anew at each step without
            replacement, the last always d_sae. The density over the prefix length l is even
            ("uniform"), or falls as 1/l ("log_uniform"), as 1/√l ("inverse_sqrt": what
            noanabeshima/matryoshka-saes calls Pareto with power 0.5) or as l^-3/2 ("pareto": the
            Pareto distribution of shape 0.5, as in OSU-NLP-Group/saev).
        n_prefixes: Number of prefixes that are drawn, d_sae included; 10 where left out, or as many
            as there are.
        min_prefix: The shortest prefix that may be drawn.
        prefix_seed: What is drawn depends on this and the step alone, so all processes and resumed
            runs draw alike. `sae-matryoshka train` takes the run's `seed` where it is left out.
        latent_order: What the levels are made of: latents by their "index", or by the "frequency"
            with which they fire, the most frequent innermost, followed with a moving average during
            training (Chanin's variants on SynthSAEBench; noanabeshima orders by importance). Saved
            SAEs have their latents in level order. Checkpoints have, too, where
            `MatryoshkaTrainingRunner` or the command line saves them; SAELens' own runner keeps
            checkpoints and `sparsity.safetensors` in the order of training.
        bias_level: Let b_dec alone be one more level, inside all others, as in
            bartbussmann/matryoshka_sae. In a list of level_weights, its weight comes first.
        inner_weight_end: What the weights of all levels but the outermost are multiplied with at
            the end: nest first, then let the whole SAE reconstruct. Not published; see
            docs/variants.md for what it does.
        inner_fade_start: Step at which these weights begin to fade.
        inner_fade_steps: Steps over which they fade, linearly.
        decoder_norm: "free", as in SAELens; "unit": latents' decoder rows have norm 1 in every
            forward pass, and their gradient no part along them (dictionary_learning);
            "unit_at_update": the same at each update, so that a forward pass sees what the last
            update made of them (bartbussmann/matryoshka_sae).
        encoder_bias: Whether b_enc is trained; else it stays 0 (bartbussmann/matryoshka_sae).
        implementation: How a training step is computed; the numbers are the same. "reference" is
            dense and reads like the paper; "sparse" touches only the codes that are kept, in
            PyTorch; "triton" does so in CUDA kernels, for parameters of at most 32 bits. "auto"
            takes "triton" on CUDA where Triton is installed, else "sparse", wherever they apply.
    """

    matryoshka_widths: list[int] = field(default_factory=list)
    level_weights: list[float] | float = command_line_field(  # noqa: RUF009
        default=1.0, nargs="+", type=float, required=False
    )
    stop_gradient: StopGradient = "none"
    prefix_sampling: PrefixSampling = "fixed"
    n_prefixes: int | None = None
    min_prefix: int = 1
    prefix_seed: int = 0
    latent_order: LatentOrder = "index"
    bias_level: bool = False
    inner_weight_end: float = 1.0
    inner_fade_start: int = 0
    inner_fade_steps: int = 0
    decoder_norm: DecoderNorm = "free"
    encoder_bias: bool = True
    implementation: Implementation = "auto"

    def check_nested_options(self: Any) -> None:
        """Check the options, and complete what was left out.

        Raises:
            ValueError: naming the field, its value and what is accepted.
        """
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
                raise invalid_option(
                    name, getattr(self, name), f"one of {', '.join(map(repr, get_args(choices)))}"
                )
        for name in ("bias_level", "encoder_bias"):
            if not isinstance(getattr(self, name), bool):
                raise invalid_option(name, getattr(self, name), "true or false")
        self.matryoshka_widths = resolve_widths(self.matryoshka_widths, self.d_sae)
        self._check_prefixes()
        self._check_weights()
        for name in ("prefix_seed", "inner_fade_start", "inner_fade_steps"):
            setattr(self, name, checked_count(name, getattr(self, name), 0))
        if not is_number(self.inner_weight_end) or not 0 <= self.inner_weight_end <= 1:
            raise invalid_option(
                "inner_weight_end",
                self.inner_weight_end,
                "a number from 0 to 1, which is where the fading starts",
            )
        self.inner_weight_end = float(self.inner_weight_end)
        if self.inner_weight_end == 1 and (self.inner_fade_start or self.inner_fade_steps):
            name = "inner_fade_start" if self.inner_fade_start else "inner_fade_steps"
            raise invalid_option(
                name, getattr(self, name), "it only beside an inner_weight_end below 1"
            )
        if self.inner_weight_end < 1 and not (self.inner_fade_start or self.inner_fade_steps):
            raise invalid_option(
                "inner_weight_end",
                self.inner_weight_end,
                "it only beside inner_fade_start or inner_fade_steps; level_weights are for the "
                "whole run",
            )
        if self.latent_order == "frequency" and self.dtype not in ("float32", "float64"):
            raise invalid_option(
                "latent_order",
                "frequency",
                f"dtype 'float32' or 'float64' with it: dtype={self.dtype!r} is too coarse for how "
                "often latents fire",
            )
        if self.implementation in ("sparse", "triton") and self.normalizes_per_row:
            raise ValueError(
                f"implementation={self.implementation!r} is not accepted beside "
                f"normalize_activations={self.normalize_activations!r}: give 'auto' or 'reference'."
            )
        if self.implementation == "triton":
            self._check_triton()

    def _check_triton(self: Any) -> None:
        lack = why_no_triton()
        if lack is not None:
            raise ValueError(
                f"implementation='triton' is not accepted on this machine, because {lack}: give "
                "'auto', 'sparse' or 'reference' (in cfg.json, for another machine's checkpoint)."
            )
        if DTYPE_MAP[self.dtype] not in TRITON_DTYPES:
            raise ValueError(
                f"implementation='triton' is not accepted beside dtype={self.dtype!r}: give "
                "'auto', 'sparse' or 'reference', or dtype 'float32', 'bfloat16' or 'float16'."
            )

    def _check_prefixes(self: Any) -> None:
        self.min_prefix = checked_count("min_prefix", self.min_prefix, 1)
        if self.n_prefixes is not None:
            self.n_prefixes = checked_count("n_prefixes", self.n_prefixes, 1)
        if self.prefix_sampling == "fixed":
            for name, default in (("n_prefixes", None), ("min_prefix", 1)):
                if getattr(self, name) != default:
                    raise invalid_option(
                        name,
                        getattr(self, name),
                        "it only beside prefix_sampling other than 'fixed', where "
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

    def _check_weights(self: Any) -> None:
        weights, n_levels = self.level_weights, self.n_levels
        if isinstance(weights, list) and len(weights) == 1 < n_levels:
            [weights] = weights  # as a command line gives one number
        if is_number(weights):
            if weights <= 0:
                raise invalid_option(
                    "level_weights", weights, "a number β above 0, or a list of one weight a level"
                )
            self.level_weights = float(weights)
            if n_levels * math.log(max(weights, 1 / weights)) > _LARGEST_LOG:
                raise invalid_option(
                    "level_weights", weights, f"a number nearer to 1 for {n_levels} levels"
                )
            return
        accepted = f"a number β above 0, or a list of {n_levels} weights of 0 or more, not all 0"
        if (
            not isinstance(weights, list | tuple)
            or len(weights) != n_levels
            or not all(is_number(weight) and weight >= 0 for weight in weights)
            or not any(weights)
        ):
            raise invalid_option("level_weights", weights, accepted)
        self.level_weights = [float(weight) for weight in weights]

    @property
    def n_levels(self: Any) -> int:
        """Levels of a step's loss, that of b_dec alone included."""
        n = len(self.matryoshka_widths)
        if self.is_sampled:
            n = self.n_prefixes or min(_DEFAULT_N_PREFIXES, self.d_sae - self.min_prefix + 1)
        return n + self.bias_level

    @property
    def normalizes_per_row(self: Any) -> bool:
        """Whether each activation is normalised by its own statistics, and denormalised after."""
        return self.normalize_activations in _PER_ROW_NORMALIZATIONS

    @property
    def is_sampled(self) -> bool:
        return self.prefix_sampling != "fixed"

    def prefixes_at(self: Any, step: int) -> list[int]:
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


@dataclass(kw_only=True)
class SparsitySchedule:
    """A k that starts high and falls to `k`.

    Args:
        k_start: k at the first step (from 80 to 25 in Chanin's variants on SynthSAEBench); `k`
            throughout where left out.
        k_anneal_steps: Steps over which it falls, linearly.
    """

    k_start: float | None = None
    k_anneal_steps: int = 0

    def check_k(self: Any, is_whole: bool) -> None:
        """Check `k` and its schedule; `is_whole` where a fraction of a latent can't be active.

        Raises:
            ValueError: naming the field, its value and what is accepted.
        """
        kind = "an integer" if is_whole else "a number"
        if not is_number(self.k) or not 0 < self.k <= self.d_sae or (is_whole and self.k % 1):
            raise invalid_option("k", self.k, f"{kind} above 0 and at most d_sae={self.d_sae}")
        is_int = is_whole or isinstance(self.k, numbers.Integral)
        self.k = int(self.k) if is_int else float(self.k)
        self.k_anneal_steps = checked_count("k_anneal_steps", self.k_anneal_steps, 0)
        if self.k_start is None:
            if self.k_anneal_steps:
                raise invalid_option(
                    "k_anneal_steps", self.k_anneal_steps, "it only beside a k_start"
                )
            return
        if not is_number(self.k_start) or not self.k <= self.k_start <= self.d_sae:
            raise invalid_option(
                "k_start",
                self.k_start,
                f"a number from k={self.k}, where the schedule ends, to d_sae={self.d_sae}",
            )
        self.k_start = float(self.k_start)
        if self.k_anneal_steps == 0:
            raise invalid_option("k_start", self.k_start, "it only beside k_anneal_steps above 0")

    def k_at(self: Any, step: int) -> float:
        """k at a step."""
        if self.k_start is None:
            return self.k
        return linear(self.k_start, self.k, step, self.k_anneal_steps)


def linear(start: float, end: float, step: int, n_steps: int) -> float:
    """`start` until step 0, `end` from step `n_steps` on, a straight line between."""
    if step >= n_steps and step >= 0:
        return end
    return start + (end - start) * max(step, 0) / max(n_steps, 1)
