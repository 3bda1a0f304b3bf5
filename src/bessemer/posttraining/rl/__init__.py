"""Reinforcement learning: a policy that samples answers and is moved towards those that are rewarded.

A method is an advantage, a loss of tokens, an aggregation, a place for the KL divergence and a correction for samples of other
weights: each a named function here, in a registry that other packages add to.
"""
