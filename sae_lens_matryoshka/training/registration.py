"""Registers the architectures of this package with SAELens."""

from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.training.batchtopk import MatryoshkaTrainingSAE
from sae_lens_matryoshka.training.config import (
    MatryoshkaJumpReLUTrainingSAEConfig,
    MatryoshkaTopKTrainingSAEConfig,
    MatryoshkaTrainingSAEConfig,
)
from sae_lens_matryoshka.training.jumprelu import MatryoshkaJumpReLUTrainingSAE
from sae_lens_matryoshka.training.topk import MatryoshkaTopKTrainingSAE

_ARCHITECTURES = (
    (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig),
    (MatryoshkaTopKTrainingSAE, MatryoshkaTopKTrainingSAEConfig),
    (MatryoshkaJumpReLUTrainingSAE, MatryoshkaJumpReLUTrainingSAEConfig),
)


def register_architectures() -> None:
    """Register the training architectures with SAELens; a second call changes nothing.

    Raises:
        ValueError: another package registered the name of one first.
    """
    for sae_class, config_class in _ARCHITECTURES:
        name = config_class.architecture()
        known = SAE_TRAINING_CLASS_REGISTRY.pop(name, None)  # ours after a reload
        if known is not None and _full_name(known[0]) != _full_name(sae_class):
            SAE_TRAINING_CLASS_REGISTRY[name] = known
            raise ValueError(
                f"The SAELens architecture {name!r} is already taken by {_full_name(known[0])}, so "
                f"{_full_name(sae_class)} can't be registered under that name. Use one of the two "
                "packages in a process."
            )
        register_sae_training_class(name, sae_class, config_class)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
