"""A conversation: its messages, and the transcript of those that a model has read, as token ids.

The transcript is only appended to: sampled tokens are never decoded and encoded again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.assistant.messages import Message, Part
from bessemer.core.errors import RequestError
from bessemer.tokenization.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class Snapshot:
    """Where a conversation is taken back to."""

    messages: tuple[Message, ...]
    encoded: int
    tokens: int


class Conversation:
    """Messages, and the transcript of those that were encoded.

    Encoded messages cannot change; `forget` leaves some out and begins a new transcript, as do other tools.
    """

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self._messages = list(messages)
        self._encoded = 0
        self._tools: list[Mapping[str, Any]] = []
        self.transcript = Transcript()

    @property
    def messages(self) -> Sequence[Message]:
        """All messages in order."""
        return tuple(self._messages)

    @property
    def is_tainted(self) -> bool:
        """Whether the assistant reads anything that neither the user nor the system wrote."""
        return any(message.is_tainted for message in self._messages)

    def add(self, *messages: Message) -> None:
        """Add messages at the end."""
        self._messages += messages

    def add_part(self, part: Part) -> None:
        """Add a part, a document for example, to the last message, which the assistant has not read yet."""
        assert self._encoded < len(self._messages), "the last message is encoded already"
        self._messages[-1] = self._messages[-1].with_part(part)

    def take_back(self) -> None:
        """Leave out the last message, which the assistant has not read yet."""
        assert self._encoded < len(self._messages), "the last message is encoded already"
        del self._messages[-1]

    def forget(self, first: int, end: int) -> None:
        """Leave out the messages `first` to `end` − 1. The others are encoded anew."""
        del self._messages[first:end]
        self._begin_again()

    def offer(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Describe these tools to the assistant, in the form of chat completions. Other ones than before begin a new
        transcript: they are described at its beginning."""
        if list(tools) != self._tools:
            self._tools = list(tools)
            self._begin_again()

    @property
    def offered(self) -> Sequence[Mapping[str, Any]]:
        """The tools that are described to the assistant."""
        return self._tools

    def template_inputs(self) -> list[dict[str, Any]]:
        """The messages for a chat template or an API. Raises RequestError where it is not the assistant's turn."""
        if not self._messages or self._messages[-1].role == "assistant":
            raise RequestError("the conversation has nothing that the assistant could answer; add what the user says")
        return [message.as_template_input() for message in self._messages]

    def encode(self, tokenizer: Tokenizer) -> None:
        """Extend the transcript by what the assistant has not read yet, up to where it speaks next.

        Raises RequestError where the chat template refuses it, has no place for the tools, or cannot be continued in tokens.
        """
        given, transcript = self.template_inputs(), self.transcript
        if self._encoded == len(given):
            return
        tools = self._tools or None
        if tools and "tools" not in (tokenizer.chat_template or ""):
            raise RequestError(f"{tokenizer.folder}: the chat template has no place for tools; offer none to this model")
        if not transcript.ids:
            transcript.append(tokenizer.apply_chat_template(given, add_generation_prompt=True, tools=tools))
        else:
            answered = self._encoded - 1
            assert self._messages[answered].role == "assistant", "a transcript ends with what the assistant said"
            end, ids = tokenizer.continue_chat(given, answered, tools)
            # cut at max_tokens or by a stop string, or not sampled at all
            transcript.append(ids if transcript.ids[-1] in tokenizer.eos_ids else [end, *ids])
        self._encoded = len(self._messages)

    def fork(self) -> Conversation:
        """Another conversation that is the same so far; what was encoded is not encoded again."""
        other = Conversation(self._messages)
        other._encoded, other._tools, other.transcript = self._encoded, self._tools, self.transcript.copy()
        return other

    def add_answer(self, message: Message) -> None:
        """Add what the assistant said, whose tokens are in the transcript."""
        self._messages.append(message)
        self._encoded = len(self._messages)

    def change_answer(self, message: Message) -> None:
        """Put another in place of what the assistant said last. Its tokens stay as they were sampled."""
        assert self._messages[-1].role == "assistant", "the last message is not the assistant's"
        self._messages[-1] = message

    def snapshot(self) -> Snapshot:
        """Where the conversation is now."""
        return Snapshot(tuple(self._messages), self._encoded, len(self.transcript))

    def restore(self, snapshot: Snapshot) -> None:
        """Take the conversation back to where it was."""
        self._messages = list(snapshot.messages)
        self._encoded = snapshot.encoded
        self.transcript.roll_back(snapshot.tokens)

    def _begin_again(self) -> None:
        self.transcript = Transcript()
        self._encoded = 0
