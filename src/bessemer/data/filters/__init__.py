"""Scores of documents: pure functions from an Arrow array of texts to score columns, free of any engine."""
