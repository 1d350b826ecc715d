"""Holds generated text to a grammar. No torch here, and llguidance is loaded only when a grammar comes."""
