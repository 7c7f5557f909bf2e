"""Matryoshka sparse autoencoders for SAELens.

Importing this package registers the training architectures `"matryoshka"`, `"matryoshka_topk"` and
`"matryoshka_jumprelu"`.
"""

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import decode_levels, truncate, widths_of
from sae_lens_matryoshka.training.batchtopk import MatryoshkaTrainingSAE
from sae_lens_matryoshka.training.config import (
    MatryoshkaJumpReLUTrainingSAEConfig,
    MatryoshkaTopKTrainingSAEConfig,
    MatryoshkaTrainingSAEConfig,
)
from sae_lens_matryoshka.training.registration import register
from sae_lens_matryoshka.training.thresholds import calibrate_threshold
from sae_lens_matryoshka.training.topk import (
    MatryoshkaJumpReLUTrainingSAE,
    MatryoshkaTopKTrainingSAE,
)

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

register(MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig)
register(MatryoshkaTopKTrainingSAE, MatryoshkaTopKTrainingSAEConfig)
register(MatryoshkaJumpReLUTrainingSAE, MatryoshkaJumpReLUTrainingSAEConfig)
