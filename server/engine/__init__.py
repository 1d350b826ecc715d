"""The engine: scheduling, KV cache, model execution and sampling, in a process of its own."""
