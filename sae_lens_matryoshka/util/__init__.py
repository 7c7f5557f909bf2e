"""Small helpers that all other subpackages share."""
