"""Segments of a conversation to token ids, as the tokenizer itself would read the rendered text.

Text around control tokens is not always encoded as if it stood alone: a space may be put before the first piece only,
a control token may swallow the white space beside it. So the conversation is encoded in one piece, by a copy of the
tokenizer in which every control token is written otherwise, with marks that the conversation does not hold. The
template's control tokens are written so; one that somebody typed is no control token of this copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers

from bessemer.tokenization.chat import Segment

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class ChatEncoder:
    """Encodes segments with one tokenizer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, control_ids: Mapping[str, int]) -> None:
        """control_ids: the control tokens and their ids. Raises ValueError when they cannot be written otherwise."""
        self._tokenizer, self._control_ids = tokenizer, dict(control_ids)
        self._controls = frozenset(control_ids.values())
        self._copy = lru_cache(maxsize=2)(self._renamed)
        self._copy(1)

    def encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Ids, and which of them the assistant says. A token that is only in part the assistant's is not."""
        marks = 1 + max((len(run) for segment in segments for run in re.findall(f"{_OPEN}+", segment.text)), default=0)
        pieces = [(segment, self._name(segment.text, marks) if segment.is_control else segment.text) for segment in segments]
        encoding = self._copy(marks).encode("".join(text for _, text in pieces), add_special_tokens=False)
        says = b"".join((b"\1" if segment.is_assistant else b"\0") * len(text) for segment, text in pieces)
        mask = [
            bool(says[start]) if id in self._controls else start < end and says.find(0, start, end) < 0
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        return encoding.ids, mask

    @staticmethod
    def _name(token: str, marks: int) -> str:
        return _OPEN * marks + token + _CLOSE

    def _renamed(self, marks: int) -> tokenizers.Tokenizer:
        """The tokenizer with its control tokens between marks; no text without so many marks in a row holds one."""
        content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        names = {token: self._name(token, marks) for token in self._control_ids}
        for added in content["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        content["post_processor"] = content["truncation"] = content["padding"] = None
        try:
            copy = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"its control tokens are woven into the vocabulary ({error})") from None
        for token, id in self._control_ids.items():
            if copy.token_to_id(names[token]) != id:
                raise ValueError(f"the control token {token!r} has no id of its own")
        return copy
