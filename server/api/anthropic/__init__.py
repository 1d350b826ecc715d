"""Anthropic's Messages API, on the same turns as chat completions."""
