"""Compiled CPU kernels in C++, built on first use: packed matmuls, paged attention, whole decode steps."""
