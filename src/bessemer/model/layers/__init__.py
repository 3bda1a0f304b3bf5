"""Layers of the decoder: attention and its cache, feed-forwards, norms, positions."""
