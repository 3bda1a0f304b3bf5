"""Encoding of a conversation's segments to the token ids of the rendered text.

Text around control tokens is not always encoded as if it stood alone: a space may be put before the first piece only,
a control token may swallow the white space beside it. So the conversation is encoded in one piece, by a copy of the
tokenizer in which every control token has another name, drawn by chance and never shown. The template's control tokens
are written by that name; one that somebody typed is no control token of this copy.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from bessemer.tokenization.chat import Segment

#: The library encodes one text without letting other threads run, and several with; it is slower for a short one.
_LONG = 1 << 14


def encode_beside_others(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """The encoding of a text, during which other threads run where it is long."""
    if len(text) <= _LONG:
        return tokenizer.encode(text, add_special_tokens=False)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
    return encoding


class ChatEncoder:
    """Encodes segments with one tokenizer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, control_ids: Mapping[str, int]) -> None:
        """control_ids: the control tokens and their ids. Raises ValueError when they cannot be given other names."""
        self._controls = frozenset(control_ids.values())
        secret = secrets.token_hex(16)
        self._names = {token: f"<{secret}:{token}>" for token in control_ids}
        self._copy = _renamed(tokenizer, self._names)
        for token, id in control_ids.items():
            if self._copy.token_to_id(self._names[token]) != id:
                raise ValueError(f"the control token {token!r} has no id of its own")

    def encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Ids, and the assistant mask: True for tokens that lie wholly in the assistant's messages."""
        pieces = [(segment, self._names[segment.text] if segment.is_control else segment.text) for segment in segments]
        encoding = encode_beside_others(self._copy, "".join(text for _, text in pieces))
        says = b"".join((b"\1" if segment.is_assistant else b"\0") * len(text) for segment, text in pieces)
        mask = [
            bool(says[start]) if id in self._controls else start < end and says.find(0, start, end) < 0
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        return encoding.ids, mask


def _renamed(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer with other names for some of its tokens. Raises ValueError when its merges need the old ones."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
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
        return tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:
        # the library raises the bare class
        raise ValueError(f"its control tokens are woven into the vocabulary ({error})") from None
