"""The tags of thinking in tokens: whether a prompt opens it, and what closes it."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.assistant.parser import ThinkingTags
from bessemer.tokenization.tokenizer import Tokenizer

#: Tokens of a prompt's end in which an opening tag would stand.
_END_OF_PROMPT = 16


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
    def closing(self) -> list[int]:
        """The closing tag and the empty line behind it, in the tokens of a text that holds both."""
        return self._line(self.tags.closing)

    @property
    def none(self) -> list[int]:
        """Thinking that holds nothing, as templates write it for an answer without any."""
        return [*self._line(self.tags.opening), *self.closing]

    def _line(self, tag: str) -> list[int]:
        """A tag and an empty line: the end of a tag that is no control token may be one token with the line."""
        control = self.tokenizer.control_id(tag)
        if control is None:
            return self.tokenizer.encode(f"{tag}\n\n", add_bos=False)
        return [control, *self.tokenizer.encode("\n\n", add_bos=False)]
