"""The page of a tree, served on this machine with its model: texts, steering, labels."""
