"""A conversation as token ids. They are only appended: what was sampled is never decoded and encoded again."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Transcript:
    """Token ids of a conversation, and of each: whether the policy wrote it, how likely it was, with which weights.

    ids: what the model reads. is_own: True for tokens that the policy sampled; prompts, results of tools and tags that close
    the thinking are not its own. log_probs: in nats, of its own tokens as they were sampled (NaN where nobody asked), 0 of
    others. weight_versions: `Engine.weight_version` when its own token was sampled, 0 of others.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.is_own: list[bool] = []
        self.log_probs: list[float] = []
        self.weight_versions: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def own_tokens(self) -> int:
        """How many tokens the policy wrote."""
        return sum(self.is_own)

    def copy(self) -> Transcript:
        """A transcript of its own with the same tokens."""
        other = Transcript()
        other.ids, other.is_own = list(self.ids), list(self.is_own)
        other.log_probs, other.weight_versions = list(self.log_probs), list(self.weight_versions)
        return other

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens that the policy did not write."""
        self._extend(ids, False, [0.0] * len(ids), 0)

    def append_own(self, ids: Sequence[int], log_probs: Sequence[float] | None, weight_version: int = 0) -> None:
        """Add tokens that the policy sampled. log_probs: of each; None where they are not known."""
        log_probs = [math.nan] * len(ids) if log_probs is None else log_probs
        assert len(log_probs) == len(ids), "a token, a log-probability"
        self._extend(ids, True, log_probs, weight_version)

    def roll_back(self, length: int) -> None:
        """Leave out all but the first `length` tokens."""
        assert 0 <= length <= len(self), "a transcript is taken back, not forward"
        for values in (self.ids, self.is_own, self.log_probs, self.weight_versions):
            del values[length:]

    def _extend(self, ids: Sequence[int], is_own: bool, log_probs: Sequence[float], weight_version: int) -> None:
        self.ids += ids
        self.is_own += [is_own] * len(ids)
        self.log_probs += log_probs
        self.weight_versions += [weight_version] * len(ids)
