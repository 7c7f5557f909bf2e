"""Sums over the sparse codes of a batch: the only arithmetic of a step besides the encode product."""
