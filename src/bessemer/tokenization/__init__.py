"""The tokenization room."""
