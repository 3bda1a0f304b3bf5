"""Edits: pure functions from a batch of texts to edited texts and counts of the changes."""
