"""The HTTP side: wire format, routes, streams. Knows the front, never the engine."""
