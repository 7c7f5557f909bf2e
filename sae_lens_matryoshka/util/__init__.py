"""What has nothing to do with SAEs."""
