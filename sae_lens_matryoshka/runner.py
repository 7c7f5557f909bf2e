"""The resumable runner under its public name; see `runs.runner`."""

from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner, check_resumable

__all__ = ["MatryoshkaTrainingRunner", "TrainingInterrupted", "check_resumable"]
