"""Holds generated text to grammars, which server/grammar_library.py matches. No torch here."""
