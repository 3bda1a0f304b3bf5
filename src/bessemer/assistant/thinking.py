"""The tags of thinking in tokens: whether a prompt opens it, and what closes it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bessemer.assistant.parser import ThinkingTags
from bessemer.tokenization.tokenizer import Tokenizer

#: Tokens of a prompt's end in which an opening tag would stand.
_END_OF_PROMPT = 16
#: What may be a control token.
_TAG = re.compile(r"(<[^<>]+>)")


class ThinkingTokens:
    """The tags of thinking as a tokenizer writes them."""

    def __init__(self, tokenizer: Tokenizer, tags: ThinkingTags | None = None) -> None:
        self.tokenizer = tokenizer
        self.tags = tags or ThinkingTags()

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the opening tag, as those of models that always think do."""
        end = self.tokenizer.decode(prompt[-_END_OF_PROMPT:], skip_special=False)
        return end.rstrip().endswith(self.tags.opening)

    @property
    def in_template(self) -> bool:
        """Whether the chat template knows the tags."""
        return self.tags.opening in (self.tokenizer.chat_template or "")

    @property
    def opening(self) -> list[int]:
        """The opening tag, and what stands between it and the thinking."""
        return self._encoded(self.tags.opening + self.tags.inside)

    @property
    def closing(self) -> list[int]:
        """The closing tag and what stands behind it, in the tokens of a text that holds both."""
        return self._encoded(self.tags.closing + self.tags.after)

    @property
    def after(self) -> list[int]:
        """What stands behind a closing tag that the model wrote."""
        return self._encoded(self.tags.after)

    @property
    def answer(self) -> list[int]:
        """What stands before the answer itself, behind thinking or without any."""
        return self._encoded(self.tags.answer)

    @property
    def none(self) -> list[int]:
        """Thinking that holds nothing, as templates write it for an answer without any."""
        return [*self._encoded(self.tags.opening + 2 * self.tags.inside), *self.closing]

    @property
    def closing_token(self) -> int | None:
        """The closing tag, where it is a control token."""
        return self.tokenizer.control_id(self.tags.closing)

    def _encoded(self, text: str) -> list[int]:
        """A text in which control tokens are themselves; the end of a tag that is none may be one token with what follows."""
        ids: list[int] = []
        plain = ""
        for piece in _TAG.split(text):
            control = self.tokenizer.control_id(piece)
            if control is None:
                plain += piece
                continue
            ids += self._plain(plain)
            ids.append(control)
            plain = ""
        return [*ids, *self._plain(plain)]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False) if text else []
