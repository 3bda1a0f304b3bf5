"""Copies, near copies and repeated passages, found without an engine: streams of documents in, removals out."""
