"""Honesty: pairs that prefer "I don't know" to an answer that the corpus does not hold."""
