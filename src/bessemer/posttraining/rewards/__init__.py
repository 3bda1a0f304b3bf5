"""Rewards: what a completion is worth, and the stage `reward`, which trains a reward model.

A reward is a function with TRL's signature, `(completions, prompts, **columns) -> list[float | None]`: of completions of
prompts, with the columns of the data set, a number for each, or None where it does not judge one. Our own are made from
settings, in a registry that other packages add to; a user's is `file.py:function`.
"""
