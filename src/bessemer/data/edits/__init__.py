"""Edits: pure functions from a batch of texts to the texts as they should be, and counts of what was changed."""
