"""Quantisation schemes, a file each; `registry` lists them."""
