"""Synthetic data: prompts and answers that a model writes, through the refinery's filters, with where they come from."""
