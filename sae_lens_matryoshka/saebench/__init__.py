"""The real SAEBench over levels, seeds and baselines (extra `eval`)."""
