"""Activations on disk: reading, shuffled batches to train on, and caching those of a model."""
