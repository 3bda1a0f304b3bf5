"""Deduplication without an engine: copies, near copies and repeated passages. Streams of documents in, removals out."""
