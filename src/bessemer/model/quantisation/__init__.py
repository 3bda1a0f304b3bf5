"""Quantisation to 8 and 4 bits: methods, calibration, and files."""
