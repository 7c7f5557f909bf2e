"""Sums over the sparse codes of a batch, the arithmetic of a step besides the encode product."""
