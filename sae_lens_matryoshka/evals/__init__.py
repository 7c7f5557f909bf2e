"""Per-level metrics of a trained SAE, with tables and plots."""
