"""The decoder: its settings, parts, families, file formats, quantisation and compiled CPU kernels."""
