"""The resumable runner under its public name; see `runs.runner`."""

from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

__all__ = ["MatryoshkaTrainingRunner"]
