"""Evaluation: bits per byte and its baselines, tasks answered by generation, bootstrap intervals."""
