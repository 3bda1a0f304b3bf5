"""A task's contexts as tokens: the tokenizer's begin, the chat template, and what does not fit cut from the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.tasks.questions import Context, ContinuationRequest
from bessemer.tokenization.prompts import encode_continuations
from bessemer.tokenization.tokenizer import Tokenizer

#: Tokens that are shown of the beginning of a task's prompts.
_SHOWN = 5


@dataclass(frozen=True)
class EncodedPart:
    """Tokens of a context and of its continuations. cut: tokens of the context that were left out."""

    context: list[int]
    continuations: list[list[int]]
    cut: int = 0


class PromptEncoder:
    """Encodes for one model. context_length: the most tokens that it reads."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, begin_token: bool = False) -> None:
        """begin_token: whether a text begins with the begin token even where the tokenizer writes none."""
        self._tokenizer = tokenizer
        self._context_length = context_length
        missing = [tokenizer.bos_id] if begin_token and not tokenizer.begin_ids else []
        self._begin = missing or list(tokenizer.begin_ids)
        self._missing = missing

    def part(self, part: ContinuationRequest) -> EncodedPart:
        """Encode a context and its continuations: a text as `encode_continuations` does, a conversation with the continuations
        alone. The last token of a continuation is not read and needs no place in the context."""
        if isinstance(part.context, str):
            context, continuations = encode_continuations(self._tokenizer, part.context, part.continuations)
            context = self._begun(context)
            space = part.context[len(part.context.rstrip()) :]
            continuations = [
                self._whole(space + text, ids) for text, ids in zip(part.continuations, continuations, strict=True)
            ]
        else:
            context = self._conversation(part.context)
            continuations = [self._tokenizer.encode(each, add_bos=False) for each in part.continuations]
        context, cut = self._cut(context, self._context_length + 1 - max(map(len, continuations)))
        return EncodedPart(context, continuations, cut)

    def count(self, context: Context) -> int:
        """How many tokens a context has, all of it."""
        return len(self._encoded(context))

    def prompt(self, context: Context, max_tokens: int) -> EncodedPart:
        """A context that leaves room for `max_tokens`, or for half of the model's context where that is less."""
        ids = self._encoded(context)
        kept, cut = self._cut(
            ids or [self._tokenizer.bos_id], self._context_length - min(max_tokens, self._context_length // 2)
        )
        return EncodedPart(kept, [], cut)

    def beginning(self, ids: Sequence[int]) -> str:
        """The first tokens of a prompt, for a reader, and whether a begin token is among them."""
        shown = " ".join(repr(self._tokenizer.decode([id], skip_special=False)) for id in ids[:_SHOWN])
        begins = bool(ids) and self._tokenizer.is_special(ids[0])
        doubled = len(ids) > 1 and ids[0] == ids[1] and begins
        return shown + (" (the begin token twice)" if doubled else "" if begins else " (no begin token)")

    def _encoded(self, context: Context) -> list[int]:
        return self._begun(self._tokenizer.encode(context)) if isinstance(context, str) else self._conversation(context)

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def _whole(self, text: str, ids: list[int]) -> list[int]:
        """Tokens of a whole continuation. It is encoded alone where its beginning shares a token with the end of the context,
        as `-` does in `=-7`: there the convention leaves it out."""
        if not self._tokenizer.lossless or self._tokenizer.decode_bytes(ids, beginning=False) == text.encode():
            return ids
        return self._tokenizer.encode(text, add_bos=False)

    def _begun(self, ids: list[int]) -> list[int]:
        """A text's tokens with the begin token that `begin_token` adds; an empty text is that token already."""
        return ids if ids == self._missing else self._missing + ids

    def _cut(self, ids: list[int], most: int) -> tuple[list[int], int]:
        """The last `most` tokens behind the begin token, and how many were left out."""
        if len(ids) <= most:
            return ids, 0
        begin = self._begin
        if ids[: len(begin)] != begin or len(begin) >= most:
            begin = []
        kept = begin + ids[len(ids) - max(most - len(begin), 1) :]
        return kept, len(ids) - len(kept)
