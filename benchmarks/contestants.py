"""The SAEs that are compared, each in the trainer of its own library."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import str_to_dtype

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.options import Implementation

ONE_LEVEL = ", one level"
OURS, OURS_FLAT, REFERENCE = "ours", f"ours{ONE_LEVEL}", "ours, reference"
SAELENS, SAELENS_FLAT = "SAELens matryoshka_batchtopk", "SAELens batchtopk"
PEER = "dictionary_learning matryoshka"
ENCODE = "encode product alone"
VARIANTS: dict[str, dict[str, Any]] = {
    "level_weights=0.5": {"level_weights": 0.5},
    'stop_gradient="inner"': {"stop_gradient": "inner"},
    'stop_gradient="all"': {"stop_gradient": "all"},
    "bias_level=True": {"bias_level": True},
    'prefix_sampling="log_uniform", n_prefixes=5': {
        "prefix_sampling": "log_uniform",
        "n_prefixes": 5,
    },
    'prefix_sampling="log_uniform", n_prefixes=10': {
        "prefix_sampling": "log_uniform",
        "n_prefixes": 10,
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
    device: str = "cpu"
    dtype: str = "float32"
    autocast: bool = False


class Contestant:
    """One SAE in its trainer, with its batches."""

    parameters: list[torch.Tensor]

    def __init__(self, name: str, setup: Setup):
        self.setup = setup
        torch.manual_seed(0)
        self.batches = _batches(setup)
        self.dead = torch.zeros(setup.d_sae, dtype=torch.bool, device=setup.device)
        self.dead[torch.randperm(setup.d_sae)[: setup.n_dead]] = True
        self.turn = 0
        if name == PEER:
            self._forward_backward, self._step = _dictionary_learning(self)
        else:
            self._forward_backward, self._step = _saelens(name, self)

    def forward_backward(self) -> None:
        self._forward_backward(self._next_batch())

    def step(self) -> None:
        self._step(self._next_batch())

    def _next_batch(self) -> torch.Tensor:
        self.turn += 1
        return self.batches[self.turn % len(self.batches)]


def _batches(setup: Setup) -> list[torch.Tensor]:
    """Sparse sums of random directions: activations whose codes differ from row to row."""
    n_features = 4 * setup.d_in
    directions = torch.randn(n_features, setup.d_in, device=setup.device) / setup.d_in**0.5
    batches = []
    for _ in range(4):
        shape = (setup.batch_size, n_features)
        active = torch.rand(shape, device=setup.device) < 20 / n_features
        strengths = torch.rand(shape, device=setup.device) + 0.5
        batches.append((active * strengths) @ directions)
    return [batch.to(str_to_dtype(setup.dtype)) for batch in batches]


def _make_sae(name: str, setup: Setup) -> TrainingSAE[Any]:
    shape: dict[str, Any] = {
        "d_in": setup.d_in,
        "d_sae": setup.d_sae,
        "k": setup.k,
        "dtype": setup.dtype,
        "device": setup.device,
    }
    if name == SAELENS_FLAT:
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
    if name == SAELENS:
        cfg = MatryoshkaBatchTopKTrainingSAEConfig(**shape, matryoshka_widths=setup.widths)
        return MatryoshkaBatchTopKTrainingSAE(cfg)
    return MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(
            **shape,
            matryoshka_widths=[setup.d_sae] if name.endswith(ONE_LEVEL) else setup.widths,
            **OUR_OPTIONS[name.removesuffix(ONE_LEVEL)],
        )
    )


def _saelens(
    name: str, contestant: Contestant
) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    setup = contestant.setup
    sae = _make_sae(name, setup)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**9,
            device=setup.device,
            autocast=setup.autocast,
            lr=3e-4,
            lr_end=3e-4,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=setup.batch_size,
            dead_feature_window=10**6,
            feature_sampling_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1,
        ),
        sae=sae,
        data_provider=iter(()),
    )

    contestant.parameters = list(sae.parameters())

    def forward_backward(batch: torch.Tensor) -> None:
        with trainer.autocast_if_enabled:
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=batch,
                    coefficients={},
                    dead_neuron_mask=contestant.dead,
                    n_training_steps=contestant.turn,
                    is_logging_step=False,
                )
            )
        output.loss.backward()
        sae.zero_grad()

    def step(batch: torch.Tensor) -> None:
        trainer.n_forward_passes_since_fired[contestant.dead] = 10**7
        trainer.step(batch)

    return forward_backward, step


def _dictionary_learning(
    contestant: Contestant,
) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # type: ignore[import-not-found]
        MatryoshkaBatchTopKTrainer,
    )

    setup = contestant.setup
    ends = [0, *setup.widths]
    trainer = MatryoshkaBatchTopKTrainer(
        steps=10**6,
        activation_dim=setup.d_in,
        dict_size=setup.d_sae,
        k=int(setup.k),
        layer=0,
        lm_name="none",
        group_fractions=[(b - a) / setup.d_sae for a, b in itertools.pairwise(ends)],
        device=setup.device,
    )
    trainer.ae.to(dtype=str_to_dtype(setup.dtype))
    contestant.parameters = list(trainer.ae.parameters())

    def mark_dead() -> None:
        trainer.num_tokens_since_fired[contestant.dead] = 10**9

    def forward_backward(batch: torch.Tensor) -> None:
        mark_dead()
        trainer.loss(batch, step=contestant.turn).backward()
        trainer.ae.zero_grad()

    def step(batch: torch.Tensor) -> None:
        mark_dead()
        trainer.update(contestant.turn, batch)

    return forward_backward, step


def encode_product(setup: Setup) -> Callable[[], torch.Tensor]:
    """The product that every SAE computes, of a batch with the encoder."""
    batch = _batches(setup)[0]
    encoder = torch.randn(setup.d_in, setup.d_sae, device=setup.device).to(batch.dtype)

    def run() -> torch.Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=setup.autocast):
            return batch @ encoder

    return run


def our_implementations(device: str) -> list[str]:
    """The implementations of this package that run on `device`, the fastest first."""
    has_triton = (
        torch.device(device).type == "cuda"
        and "triton" in get_args(Implementation)
        and importlib.util.find_spec("triton") is not None
    )
    return [*(["triton"] if has_triton else []), "sparse", "reference"]


def has_peer() -> bool:
    try:
        import dictionary_learning.trainers.matryoshka_batch_top_k  # type: ignore  # noqa: F401
    except ImportError:
        return False
    return True
