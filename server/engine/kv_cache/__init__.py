"""The paged KV cache: who holds which block (no torch here), and the tensors that the blocks are made of."""
