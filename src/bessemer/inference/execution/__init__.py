"""Execution of a scheduled batch: KV cache, attention backends, executors, CUDA graphs."""
