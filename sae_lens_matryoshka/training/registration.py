"""Registers the architectures of this package with SAELens."""

import importlib
from collections.abc import Sequence
from typing import Any, cast

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from typing_extensions import override

_TRAINING = __name__.rpartition(".")[0]
_ARCHITECTURES = {  # architecture: module and name of its class; its config is NameConfig
    "matryoshka": ("batchtopk", "MatryoshkaTrainingSAE"),
    "matryoshka_topk": ("topk", "MatryoshkaTopKTrainingSAE"),
    "matryoshka_jumprelu": ("jumprelu", "MatryoshkaJumpReLUTrainingSAE"),
}


class _Classes(Sequence[Any]):
    """An architecture's class and config class, imported when SAELens reads one of them.

    So loading an SAE for inference, which imports SAELens, imports no training class.
    """

    def __init__(self, module: str, name: str) -> None:
        self._sources = ((module, name), ("config", f"{name}Config"))
        self.full_name = f"{_TRAINING}.{module}.{name}"

    @override
    def __getitem__(self, index: Any) -> Any:
        module, name = self._sources[index]
        return getattr(importlib.import_module(f"{_TRAINING}.{module}"), name)

    @override
    def __len__(self) -> int:
        return len(self._sources)


def register_architectures() -> None:
    """Register the training architectures with SAELens; a second call changes nothing.

    Raises:
        ValueError: another package registered the name of one first.
    """
    for architecture, names in _ARCHITECTURES.items():
        classes = _Classes(*names)
        taken = SAE_TRAINING_CLASS_REGISTRY.get(architecture)
        if taken is not None:
            full_name = f"{taken[0].__module__}.{taken[0].__qualname__}"
            if full_name != classes.full_name:
                raise ValueError(
                    f"The SAELens architecture {architecture!r} is already taken by {full_name}, "
                    f"so {classes.full_name} can't be registered under that name. Use one of the "
                    "two packages in a process."
                )
        SAE_TRAINING_CLASS_REGISTRY[architecture] = cast(Any, classes)
