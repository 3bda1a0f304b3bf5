"""File formats of sources."""
