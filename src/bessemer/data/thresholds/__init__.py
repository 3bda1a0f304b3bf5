"""Limits of score columns: presets, the usual limits of rules and scores, how they are applied."""
