"""Making SAELens know the architectures of this package."""

from __future__ import annotations

from typing import Any

from sae_lens import TrainingSAE, TrainingSAEConfig, register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY


def register(sae_class: type[TrainingSAE[Any]], config_class: type[TrainingSAEConfig]) -> None:
    """Register a training architecture with SAELens, once however often the package is imported.

    Raises:
        ValueError: another package registered the architecture's name first.
    """
    name = config_class.architecture()
    known = SAE_TRAINING_CLASS_REGISTRY.get(name)
    if known is not None:
        if _full_name(known[0]) != _full_name(sae_class):
            raise ValueError(
                f"The SAELens architecture {name!r} is already taken by {_full_name(known[0])}, so "
                f"{_full_name(sae_class)} can't be registered under that name. Use one of the two "
                "packages in a process."
            )
        del SAE_TRAINING_CLASS_REGISTRY[name]  # a reload: the new classes replace the old ones
    register_sae_training_class(name, sae_class, config_class)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
