"""Continuous-batching scheduler, block pool and block tables. Pure Python: no tensors, and no torch imported."""
