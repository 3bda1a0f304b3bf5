"""Reward models: a decoder with a scalar head that learns from pairs which answer is better, and scores answers."""
