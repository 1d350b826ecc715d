"""An OpenAI-compatible inference server for Google's Gemma models."""

__version__ = "0.1.0"
