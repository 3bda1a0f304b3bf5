"""Preference optimisation: learning from pairs of a better and a worse answer, or from answers that are good or bad."""
