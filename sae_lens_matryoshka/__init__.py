"""Matryoshka sparse autoencoders for SAELens.

Importing this package registers the training architecture `"matryoshka"`.
"""

from sae_lens_matryoshka.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.hub import load_sae
from sae_lens_matryoshka.levels import decode_levels, truncate, widths_of
from sae_lens_matryoshka.registration import register
from sae_lens_matryoshka.thresholds import calibrate_threshold
from sae_lens_matryoshka.training_sae import MatryoshkaTrainingSAE

__version__ = "0.1.0"
__all__ = [
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
