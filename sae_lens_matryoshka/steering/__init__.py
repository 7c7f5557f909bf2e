"""A model with some latents of an SAE changed, and what it then writes."""

from sae_lens_matryoshka.steering.changes import latents_of_level
from sae_lens_matryoshka.steering.generation import Comparison, compare
from sae_lens_matryoshka.steering.hooks import steer

__all__ = ["Comparison", "compare", "latents_of_level", "steer"]
