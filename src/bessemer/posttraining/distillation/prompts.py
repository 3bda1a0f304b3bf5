"""Prompts that a teacher or a student answers: rows of prompts, and what stands before the last answer of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.posttraining.dataset import read_examples
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.encoding import encode_prompt
from bessemer.posttraining.formats import Answered, Message, Turns, as_answered, as_prompt, tools_of
from bessemer.posttraining.rl.prompts import Prompt
from bessemer.posttraining.rl.sampler import EncodedPrompt
from bessemer.posttraining.splits import opening, split_examples
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """What is asked: messages, or a text that is continued, and the tools that may be called."""

    prompt: Turns
    tools: tuple[Message, ...] = ()

    def encoded(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids, up to where the answer begins."""
        return encode_prompt(self.prompt, tokenizer, self.tools) or [tokenizer.bos_id]

    def answered(self, text: str) -> Answered:
        """With an answer."""
        if isinstance(self.prompt, str):
            return Answered(self.prompt, text, self.tools)
        return Answered(self.prompt, ({"role": "assistant", "content": text},), self.tools)


def before_last_answer(answered: Answered) -> Asked | None:
    """What an example asks: its prompt, or all before the assistant's last turn; None where nothing stands before it."""
    if isinstance(answered.prompt, str) or isinstance(answered.answer, str):
        return Asked(answered.prompt, answered.tools)
    if answered.prompt:
        return Asked(answered.prompt, answered.tools)
    last = max(place for place, message in enumerate(answered.answer) if message["role"] == "assistant")
    return Asked(answered.answer[:last], answered.tools) if last else None


def as_asked(row: Mapping[str, Any]) -> Asked:
    """A row of a prompt alone, or of one of the formats with answers. Raises ValueError or RequestError, in one line."""
    is_bare = "prompt" in row and "completion" not in row
    asked = _bare_prompt(row) if is_bare else before_last_answer(as_answered(row))
    if asked is None:
        raise ValueError("begins with the assistant, so that there is no prompt to answer")
    if asked.tools and isinstance(asked.prompt, str):
        raise ValueError("tools are shown in a conversation, and the prompt is a text; give it as messages")
    return asked


def _bare_prompt(row: Mapping[str, Any]) -> Asked:
    """A row of a prompt alone. As with a completion, a text without a system message is continued."""
    given = row["prompt"]
    if not given or not isinstance(given, (str, list)):
        raise ValueError(f"needs messages or a text under 'prompt'; it has {given!r}"[:200])
    messages = as_prompt(row)
    if isinstance(given, str) and len(messages) == 1:
        return Asked(given, tools_of(row))
    return Asked(messages, tools_of(row))


def gather_prompts(config: DistillationConfig, folder: Path, seed: int) -> tuple[list[Asked], list[Asked]]:
    """(training, held out) prompts of all data, in order. Raises SourceError for rows that are malformed."""
    asked = [one for name in config.data for one in read_examples(folder / name, as_asked)]
    return split_examples(asked, lambda one: opening(one.prompt), config.validation_share, seed)


def encoded_prompts(asked: Sequence[Asked], tokenizer: Tokenizer, config: DistillationConfig) -> list[EncodedPrompt]:
    """The prompts that leave room for an answer, with their tokens."""
    most = config.context_length - config.max_tokens
    encoded = ((Prompt(one.prompt), one.encoded(tokenizer)) for one in asked)
    return [(prompt, ids) for prompt, ids in encoded if len(ids) <= most]
