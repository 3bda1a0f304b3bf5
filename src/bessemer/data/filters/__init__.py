"""Filters: pure functions from a batch of texts to score columns, free of any engine."""
