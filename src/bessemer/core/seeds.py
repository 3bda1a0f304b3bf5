"""Seeds that do not depend on what ran before: each use derives its own from the recipe's."""

from __future__ import annotations

from bessemer.core.hashing import hash_value


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) for one named use ("shuffle", step, …), a pure function of its arguments."""
    return int(hash_value([seed, *names], bits=64), 16) >> 1
