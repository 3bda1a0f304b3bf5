"""The result of training an algorithm, in the terms of Hugging Face's `tokenizer.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenizerParts:
    """The sections of `tokenizer.json` that a trained algorithm fills; `folder.write_folder` adds the control tokens.

    The tokens of `model` have the ids 0 … size - 1, without control tokens except `unk_token`, the unknown token (None when
    there is none).
    """

    size: int
    model: dict[str, Any]
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None
    normalizer: dict[str, Any] | None = None
    unk_token: str | None = None
