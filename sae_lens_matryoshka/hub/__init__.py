"""Loading every published format, publishing, the model card."""

from sae_lens_matryoshka.hub.load import load_sae

__all__ = ["load_sae"]
