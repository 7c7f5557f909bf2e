"""The presets, under the name that they are imported by: see `training.presets`."""

from sae_lens_matryoshka.training.presets import bussmann, dictionary_learning

__all__ = ["bussmann", "dictionary_learning"]
