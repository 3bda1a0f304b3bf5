"""Models with weights of 8 and 4 bits: how they are made, measured, and kept on disk."""
