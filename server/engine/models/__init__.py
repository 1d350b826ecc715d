"""The Gemma decoder, its configuration, and the readers of its weights."""
