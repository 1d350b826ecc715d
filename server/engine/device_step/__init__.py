"""A whole step on a device that computes behind its host: packed inputs, graphs, and tokens that stay there."""
