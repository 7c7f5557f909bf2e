"""Matryoshka sparse autoencoders for SAELens.

Importing this package registers the training architectures `"matryoshka"`, `"matryoshka_topk"` and
`"matryoshka_jumprelu"`, at once or as soon as SAELens is imported. The public names are imported
when they are first used, so that the command line answers quickly.

It also adds SmolLM2-135M-Instruct and the demo's model to those that TransformerLens knows by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from sae_lens_matryoshka.hub.load import load_sae
    from sae_lens_matryoshka.levels.slicing import decode_levels, truncate, widths_of
    from sae_lens_matryoshka.training.batchtopk import MatryoshkaTrainingSAE
    from sae_lens_matryoshka.training.config import (
        MatryoshkaJumpReLUTrainingSAEConfig,
        MatryoshkaTopKTrainingSAEConfig,
        MatryoshkaTrainingSAEConfig,
    )
    from sae_lens_matryoshka.training.jumprelu import MatryoshkaJumpReLUTrainingSAE
    from sae_lens_matryoshka.training.thresholds import calibrate_threshold
    from sae_lens_matryoshka.training.topk import MatryoshkaTopKTrainingSAE

__version__ = "0.1.0"
__all__ = [
    "MatryoshkaJumpReLUTrainingSAE",
    "MatryoshkaJumpReLUTrainingSAEConfig",
    "MatryoshkaTopKTrainingSAE",
    "MatryoshkaTopKTrainingSAEConfig",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "__version__",
    "calibrate_threshold",
    "decode_levels",
    "load_sae",
    "truncate",
    "widths_of",
]

_MODULES = {
    "MatryoshkaJumpReLUTrainingSAE": "training.jumprelu",
    "MatryoshkaJumpReLUTrainingSAEConfig": "training.config",
    "MatryoshkaTopKTrainingSAE": "training.topk",
    "MatryoshkaTopKTrainingSAEConfig": "training.config",
    "MatryoshkaTrainingSAE": "training.batchtopk",
    "MatryoshkaTrainingSAEConfig": "training.config",
    "calibrate_threshold": "training.thresholds",
    "decode_levels": "levels.slicing",
    "load_sae": "hub.load",
    "truncate": "levels.slicing",
    "widths_of": "levels.slicing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("sae_lens")
def _register(sae_lens: Any) -> None:
    from sae_lens_matryoshka.training.registration import register_architectures

    register_architectures()


@wrapt.when_imported("transformer_lens.supported_models")
def _add_models(supported_models: Any) -> None:
    """Add models that HookedTransformer runs by their architecture and does not know by name."""
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "sae-lens-matryoshka/tiny-gpt-neox"):
        if name not in supported_models.OFFICIAL_MODEL_NAMES:
            supported_models.OFFICIAL_MODEL_NAMES.append(name)
            supported_models.MODEL_ALIASES[name] = [name.rpartition("/")[2]]
