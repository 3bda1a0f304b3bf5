"""Execution of a scheduled batch: the KV cache, paged attention, executors, CUDA graphs."""
