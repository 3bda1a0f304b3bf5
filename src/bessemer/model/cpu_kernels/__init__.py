"""Kernels in C++, built on first use: packed matrices."""
