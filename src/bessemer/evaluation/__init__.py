"""Bits per byte, its baselines, tasks answered by generation, and how sure their differences are."""
