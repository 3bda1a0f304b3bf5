"""Execution of a scheduled batch: the KV cache, paged attention, the runner and its backends."""
