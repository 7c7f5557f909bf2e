"""Peer presets under their public name; see `training.presets`."""

from sae_lens_matryoshka.training.presets import bussmann, dictionary_learning

__all__ = ["bussmann", "dictionary_learning"]
