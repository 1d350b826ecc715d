"""From logits to tokens. Importing the package imports nothing; `native_sampler` and `types` need no torch."""
