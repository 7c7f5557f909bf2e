"""Small helpers that all other rooms share."""
