"""Sampling: truncation, penalties, grammars, log-probabilities, beam search and stop strings."""
