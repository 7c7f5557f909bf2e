"""A run from a YAML file: its config, its dry run, the resumable runner."""
