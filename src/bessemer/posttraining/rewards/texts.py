"""Completions as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """What a completion says: a text, or what the last of its messages says."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def texts_of(completions: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[str]:
    """What each completion says."""
    return [text_of(completion) for completion in completions]
