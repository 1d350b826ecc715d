"""From logits to tokens. `types` and `rng` are free of torch; importing this package imports nothing."""
