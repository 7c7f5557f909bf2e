"""The resumable runner, under the name that it is imported by: see `runs.runner`."""

from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

__all__ = ["MatryoshkaTrainingRunner"]
