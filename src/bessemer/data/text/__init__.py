"""Batches of texts, cut into words and lines once and read by every filter."""
