"""Red team: attacks on a model, what their answers show, and how often they succeed.

A *goal* is what an attack is after (`goals.py`, `seeds.yaml`), an *attack* is a way to ask for it (`attacks.py`, `adaptive.py`,
`gcg.py`), an *attempt* is one attack on one goal, a *detector* reads an answer (`detectors.py`), and a *target* answers
(`targets.py`). `campaign.py` runs attempts, many at once, with a journal; `results.py` counts.
"""
