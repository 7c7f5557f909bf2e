"""The SAEs to compare, each in its own library's trainer."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import str_to_dtype
from typing_extensions import override

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.kernels.dispatch import backend_for
from sae_lens_matryoshka.kernels.triton_support import why_no_triton
from sae_lens_matryoshka.runs.fused_adam import fused_adam
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from sae_lens_matryoshka.training.monitoring import FIRST_CHECK, OBSERVED_EVERY
from sae_lens_matryoshka.training.options import Implementation

ONE_LEVEL = ", one level"
OURS, OURS_FLAT, REFERENCE = "ours", f"ours{ONE_LEVEL}", "ours, reference"
SAELENS, SAELENS_FLAT = "SAELens matryoshka_batchtopk", "SAELens batchtopk"
FUSED = ", fused Adam"
SAELENS_FUSED = SAELENS + FUSED
PEER = "dictionary_learning matryoshka"
ENCODE, SELECTION = "encode product alone", "our selection alone"
DEAD_SHARES = (0.1, 0.5, 0.9)
VARIANTS: dict[str, dict[str, Any]] = {
    "level_weights=0.5": {"level_weights": 0.5},
    'stop_gradient="inner"': {"stop_gradient": "inner"},
    'stop_gradient="all"': {"stop_gradient": "all"},
    "bias_level=True": {"bias_level": True},
    **{
        f'prefix_sampling="log_uniform", n_prefixes={n}': {
            "prefix_sampling": "log_uniform",
            "n_prefixes": n,
        }
        for n in (5, 10)
    },
    'latent_order="frequency"': {"latent_order": "frequency"},
    'decoder_norm="unit"': {"decoder_norm": "unit"},
}
OUR_OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    **{f"{OURS}, {name}": {"implementation": name} for name in get_args(Implementation)},
    **VARIANTS,
}


@dataclass(frozen=True)
class Setup:
    """What all contestants of one comparison share."""

    d_in: int
    d_sae: int
    widths: list[int]
    batch_size: int
    k: float
    n_dead: int = 0
    skewed: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    autocast: bool = False


class Contestant(ABC):
    """One SAE in its trainer, with its batches."""

    parameters: list[torch.nn.Parameter]

    def __init__(self, setup: Setup):
        self.setup = setup
        torch.manual_seed(0)
        self.batches = _batches(setup)
        self.next_batch = itertools.cycle(self.batches).__next__
        self.dead = torch.zeros(setup.d_sae, dtype=torch.bool, device=setup.device)
        self.dead[torch.randperm(setup.d_sae)[: setup.n_dead]] = True

    @abstractmethod
    def forward_backward(self) -> None:
        """The SAE's part of a step: loss and gradients."""

    @abstractmethod
    def step(self) -> None:
        """A training step, as the trainer takes it."""


class InSAELens(Contestant):
    """An SAE in SAELens' trainer, ours in that of `MatryoshkaTrainingRunner`."""

    def __init__(self, name: str, setup: Setup, **trainer_options: Any):
        super().__init__(setup)
        self._optimizer_context = fused_adam if name.endswith(FUSED) else nullcontext
        is_ours = name in OUR_OPTIONS or name.startswith(OURS)
        name = name.removesuffix(FUSED)
        shape = {name: getattr(setup, name) for name in ("d_in", "d_sae", "k", "dtype", "device")}
        sae_cfg = sae_config(name, setup.widths, **shape)
        self.sae = SAE_TRAINING_CLASS_REGISTRY[sae_cfg.architecture()][0](sae_cfg)
        self.parameters = list(self.sae.parameters())
        cfg = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=setup.batch_size,
            lr_end=3e-4,
            device=setup.device,
            autocast=setup.autocast,
            dead_feature_window=10**6,
            feature_sampling_window=10**6,
        )
        trainer_class = MatryoshkaTrainer if is_ours else SAETrainer
        self.trainer = trainer_class(
            cfg=cfg, sae=self.sae, data_provider=iter(()), **trainer_options
        )
        # from here on the monitor of our SAEs observes steps
        self.trainer.n_training_steps = FIRST_CHECK // 2

    @override
    def forward_backward(self) -> None:
        with self.trainer.autocast_if_enabled:
            output = self.sae.training_forward_pass(
                TrainStepInput(
                    sae_in=self.next_batch(),
                    coefficients={},
                    dead_neuron_mask=self.dead,
                    n_training_steps=self.trainer.n_training_steps,
                    is_logging_step=False,
                )
            )
        output.loss.backward()
        self.sae.zero_grad()

    @override
    def step(self) -> None:
        # as in `SAETrainer.fit`, with a fixed set of dead latents
        self.trainer.n_forward_passes_since_fired[self.dead] = 10**7
        self.trainer.maybe_reset_sparsity()
        with self._optimizer_context():
            self.trainer.step(self.next_batch())
        self.trainer.n_training_steps += 1

    def monitored_step(self) -> None:
        """The next training step that the monitor of our SAEs observes."""
        self.trainer.n_training_steps += -(self.trainer.n_training_steps + 1) % OBSERVED_EVERY
        self.step()


class InDictionaryLearning(Contestant):
    """A Matryoshka SAE in dictionary_learning's trainer."""

    def __init__(self, setup: Setup):
        from dictionary_learning.trainers import matryoshka_batch_top_k  # type: ignore

        super().__init__(setup)
        self.trainer = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
            steps=10**6,
            activation_dim=setup.d_in,
            dict_size=setup.d_sae,
            k=int(setup.k),
            layer=0,
            lm_name="none",
            group_fractions=[
                (end - start) / setup.d_sae for start, end in itertools.pairwise([0, *setup.widths])
            ],
            device=setup.device,
        )
        self.trainer.ae.to(dtype=str_to_dtype(setup.dtype))
        self.parameters = list(self.trainer.ae.parameters())
        self.n_steps = 0

    @override
    def forward_backward(self) -> None:
        self.trainer.num_tokens_since_fired[self.dead] = 10**9
        self.trainer.loss(self.next_batch(), step=self.n_steps).backward()
        self.trainer.ae.zero_grad()

    @override
    def step(self) -> None:
        self.trainer.num_tokens_since_fired[self.dead] = 10**9
        self.trainer.update(self.n_steps, self.next_batch())
        self.n_steps += 1


def make_contestant(name: str, setup: Setup) -> Contestant:
    if name == PEER:
        return InDictionaryLearning(setup)
    for share in DEAD_SHARES:
        if name.endswith(ending := dead_ending(share)):
            name = name.removesuffix(ending)
            setup = replace(setup, n_dead=int(share * setup.d_sae))
    return InSAELens(name, setup)


def dead_ending(share: float) -> str:
    """The suffix of a contestant with this share of dead latents."""
    return f", {share:.0%} dead"


def _batches(setup: Setup) -> list[torch.Tensor]:
    """Sparse sums of random directions: activations whose codes differ from row to row.

    Skewed, few directions are in most sums, and the first row is as long as that of a text's first
    token in a language model, which has thousands of codes.
    """
    n_features = 4 * setup.d_in
    rates = torch.full((n_features,), 20 / n_features, device=setup.device)
    if setup.skewed:
        rates = 1 / torch.arange(1, n_features + 1, device=setup.device)
        rates = (20 * rates / rates.sum()).clamp(max=1)
    directions = torch.randn(n_features, setup.d_in, device=setup.device) / setup.d_in**0.5
    batches = []
    for _ in range(5):
        shape = (setup.batch_size, n_features)
        active = torch.rand(shape, device=setup.device) < rates
        strengths = torch.rand(shape, device=setup.device) + 0.5
        batches.append((active * strengths) @ directions)
        if setup.skewed:
            batches[-1][0] *= 50
    return [batch.to(str_to_dtype(setup.dtype)) for batch in batches]


def sae_config(name: str, widths: list[int], **shape: Any) -> TrainingSAEConfig:
    """The SAE of a contestant in SAELens' trainer."""
    if name == SAELENS_FLAT:
        return BatchTopKTrainingSAEConfig(**shape)
    if name == SAELENS:
        return MatryoshkaBatchTopKTrainingSAEConfig(**shape, matryoshka_widths=widths)
    if name.endswith(ONE_LEVEL):
        widths = [shape["d_sae"]]
    options = OUR_OPTIONS[name.removesuffix(ONE_LEVEL)]
    return MatryoshkaTrainingSAEConfig(**shape, matryoshka_widths=widths, **options)


def encode_product(setup: Setup) -> Callable[[], torch.Tensor]:
    """The product of a batch with the encoder, which every SAE computes."""
    batch = _batches(setup)[0]
    encoder = torch.randn(setup.d_in, setup.d_sae, device=setup.device).to(batch.dtype)

    def run() -> torch.Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=setup.autocast):
            return batch @ encoder

    return run


def selection(setup: Setup) -> Callable[[], object]:
    """Our selection of codes by itself, with the cut of the last batch known."""
    batches = _batches(setup)
    next_batch, x = itertools.cycle(batches).__next__, batches[0]
    shape = {name: getattr(setup, name) for name in ("d_in", "d_sae", "k", "dtype", "device")}
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(**shape, matryoshka_widths=setup.widths)
    )
    backend = backend_for("auto", x.device, x.dtype)
    assert backend is not None
    norms = sae.W_dec.data.norm(dim=-1)
    rest = (sae.W_enc.data, sae.b_enc.data, norms, int(setup.k * len(x)))
    cut = None

    def run() -> None:
        nonlocal cut
        with torch.autocast(x.device.type, torch.bfloat16, enabled=setup.autocast):
            cut = backend.select(next_batch(), *rest, cut).cut

    return run


def our_implementations(device: str) -> list[str]:
    """The implementations of this package that run on `device`, the fastest first."""
    has_triton = torch.device(device).type == "cuda" and why_no_triton() is None
    return [*(["triton"] if has_triton else []), "sparse", "reference"]


def has_peer() -> bool:
    try:
        import dictionary_learning.trainers.matryoshka_batch_top_k  # type: ignore  # noqa: F401
    except ImportError:
        return False
    return True
