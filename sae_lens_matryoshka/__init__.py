"""Matryoshka sparse autoencoders for SAELens.

Importing this package registers the training architectures `"matryoshka"`, `"matryoshka_topk"` and
`"matryoshka_jumprelu"`.
"""

from sae_lens_matryoshka.config import (
    MatryoshkaJumpReLUTrainingSAEConfig,
    MatryoshkaTopKTrainingSAEConfig,
    MatryoshkaTrainingSAEConfig,
)
from sae_lens_matryoshka.dense_training_saes import (
    MatryoshkaJumpReLUTrainingSAE,
    MatryoshkaTopKTrainingSAE,
)
from sae_lens_matryoshka.hub import load_sae
from sae_lens_matryoshka.levels import decode_levels, truncate, widths_of
from sae_lens_matryoshka.registration import register
from sae_lens_matryoshka.thresholds import calibrate_threshold
from sae_lens_matryoshka.training_sae import MatryoshkaTrainingSAE

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
