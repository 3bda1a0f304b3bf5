"""Pictures: encoders of them, projectors into a decoder's space, models made of both, and preprocessing as these expect it."""
