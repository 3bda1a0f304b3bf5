"""What a generator gives."""

from __future__ import annotations

from typing import NamedTuple


class GeneratedItem(NamedTuple):
    """A prompt, and the one right answer to it: a number in digits."""

    prompt: str
    answer: str
