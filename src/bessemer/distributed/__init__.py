"""The distributed room."""
