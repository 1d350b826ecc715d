"""From logits to tokens. Importing the package imports nothing; `types`, `rng` and `draw` are free of torch."""
