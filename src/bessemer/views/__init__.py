"""Drawings of results, for the report and the terminal."""
