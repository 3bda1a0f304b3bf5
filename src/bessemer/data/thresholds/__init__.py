"""Limits of score columns: presets, languages, and how limits are applied."""
