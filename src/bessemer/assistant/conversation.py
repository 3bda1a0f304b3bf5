"""A conversation: its settings, on whose behalf it runs, its messages, and their transcript as token ids.

The transcript is only appended to: sampled tokens are never decoded and encoded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bessemer.assistant.messages import Message, MessagePart, with_system_first
from bessemer.core.config import Config, setting
from bessemer.core.errors import RequestError
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Principal:
    """A user and their groups. key: the name of their API key, never the key itself."""

    user: str
    groups: frozenset[str] = frozenset()
    key: str = ""

    def is_in_any(self, groups: Collection[str] | None) -> bool:
        """Whether the user is in one of the groups; None stands for everybody."""
        return groups is None or not self.groups.isdisjoint(groups)


#: The user of this machine's terminal.
LOCAL = Principal("local")


class AssistantConfig(Config):
    """Limits of a turn, and the format of tool calls."""

    max_rounds: int = setting(8, "messages of the assistant in a turn; after all but the last the tools it calls are run", ge=1)
    max_retries: int = setting(2, "times that one message is generated again because a hook sent it back", ge=0)
    refusal: str = setting("I can't help with that.", "answer where every attempt was sent back", min_length=1)
    thinking_budget: int | None = setting(
        None,
        "tokens of a message after which its thinking is closed and the answer begins; none: no limit",
        unit="tokens",
        ge=0,
    )
    tool_format: str | None = setting(
        None, "how the model writes calls of tools; none: as its chat template says", plugins="bessemer.tool_formats"
    )


class Transcript:
    """Token ids of a conversation; the other lists have one entry for each.

    is_own: True for tokens that the policy sampled, not for prompts, tool results and tags that the turn inserted. log_probs:
    in nats, of own tokens when they were sampled (NaN where unknown), 0 for others. weight_versions: `Engine.weight_version`
    when an own token was sampled, 0 for others.
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
        """Number of tokens that the policy sampled."""
        return sum(self.is_own)

    def copy(self) -> Transcript:
        other = Transcript()
        other.ids, other.is_own = list(self.ids), list(self.is_own)
        other.log_probs, other.weight_versions = list(self.log_probs), list(self.weight_versions)
        return other

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens that the policy did not sample."""
        self._extend(ids, False, [0.0] * len(ids), 0)

    def append_own(self, ids: Sequence[int], log_probs: Sequence[float] | None, weight_version: int = 0) -> None:
        """Add tokens that the policy sampled. log_probs: of each; None where unknown."""
        log_probs = [math.nan] * len(ids) if log_probs is None else log_probs
        assert len(log_probs) == len(ids), "a token, a log-probability"
        self._extend(ids, True, log_probs, weight_version)

    def roll_back(self, length: int) -> None:
        """Keep the first `length` tokens."""
        assert 0 <= length <= len(self), "a transcript is taken back, not forward"
        for values in (self.ids, self.is_own, self.log_probs, self.weight_versions):
            del values[length:]

    def _extend(self, ids: Sequence[int], is_own: bool, log_probs: Sequence[float], weight_version: int) -> None:
        self.ids += ids
        self.is_own += [is_own] * len(ids)
        self.log_probs += log_probs
        self.weight_versions += [weight_version] * len(ids)


def with_system_in_place(messages: list[Message], tokenizer: Tokenizer) -> list[Message]:
    """The messages as the chat template takes them: system messages at the beginning alone, unless it writes them anywhere."""
    is_later = any(message.role == "system" for message in messages[1:])
    return with_system_first(messages) if is_later and not _takes_system_anywhere(tokenizer) else messages


@lru_cache(maxsize=8)
def _takes_system_anywhere(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes a system message that is not the first. Some refuse it, some leave it out."""
    first, later = {"role": "system", "content": "first"}, {"role": "system", "content": "later"}
    user = {"role": "user", "content": "question"}
    try:
        ids = tokenizer.apply_chat_template([first, user, later], add_generation_prompt=True)
    except RequestError:
        return False
    text = tokenizer.decode(ids)
    return text.find("question") < text.find("later")


@dataclass(frozen=True)
class Snapshot:
    """A state of a conversation, for `restore`."""

    messages: tuple[Message, ...]
    encoded: int
    tokens: int


class Conversation:
    """Messages, and the transcript of those that were encoded.

    Encoded messages cannot change. `forget`, and `offer` with other tools, begin a new transcript.
    """

    def __init__(self, messages: Iterable[Message] = (), *, follows_assistant: bool = False) -> None:
        """follows_assistant: whether the assistant may speak after a message of its own."""
        self._messages = list(messages)
        self._follows_assistant = follows_assistant
        self._encoded = 0
        self._tools: list[Mapping[str, Any]] = []
        self.transcript = Transcript()

    @property
    def messages(self) -> Sequence[Message]:
        return tuple(self._messages)

    @property
    def is_tainted(self) -> bool:
        return any(message.is_tainted for message in self._messages)

    def add(self, *messages: Message) -> None:
        self._messages += messages

    def add_part(self, part: MessagePart) -> None:
        """Add a part, such as a document, to the last message, which is not yet encoded."""
        assert self._encoded < len(self._messages), "the last message is encoded already"
        self._messages[-1] = self._messages[-1].with_part(part)

    def rewrite(self, change: Callable[[Message], Message]) -> None:
        """Change each message that is not yet encoded."""
        self._messages[self._encoded :] = [change(message) for message in self._messages[self._encoded :]]

    def take_back(self) -> None:
        """Remove the last message, which is not yet encoded."""
        assert self._encoded < len(self._messages), "the last message is encoded already"
        del self._messages[-1]

    def forget(self, first: int, end: int) -> None:
        """Remove the messages `first` to `end` − 1. The others are encoded again."""
        del self._messages[first:end]
        self._begin_again()

    def offer(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Set the tools that are described to the assistant, in the form of chat completions. A change begins a new transcript,
        since they are described at its beginning."""
        if list(tools) != self._tools:
            self._tools = list(tools)
            self._begin_again()

    @property
    def offered(self) -> Sequence[Mapping[str, Any]]:
        """The tools that are described to the assistant."""
        return self._tools

    def template_inputs(self) -> list[dict[str, Any]]:
        """The messages for a chat template or an API. Raises RequestError where there is nothing to answer."""
        if not self._messages or (self._messages[-1].role == "assistant" and not self._follows_assistant):
            raise RequestError("the conversation has nothing that the assistant could answer; add what the user says")
        return [message.as_template_input() for message in self._messages]

    def encode(self, tokenizer: Tokenizer) -> None:
        """Encode the new messages into the transcript, up to where the assistant speaks next.

        Raises RequestError where the chat template refuses it, or cannot be continued in tokens.
        """
        messages, transcript = self.template_inputs(), self.transcript
        if self._encoded == len(messages):
            return
        tools = self._tools or None
        if not transcript.ids:
            transcript.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools))
        else:
            answered = self._encoded - 1
            assert self._messages[answered].role == "assistant", "a transcript ends with an answer"
            end, ids = tokenizer.continue_chat(messages, answered, tools)
            # the answer lacks its end token if max_tokens or a stop string cut it
            transcript.append(ids if transcript.ids[-1] in tokenizer.eos_ids else [end, *ids])
        self._encoded = len(self._messages)

    def fork(self) -> Conversation:
        """An independent copy, which keeps the transcript."""
        other = Conversation(self._messages, follows_assistant=self._follows_assistant)
        other._encoded, other._tools, other.transcript = self._encoded, self._tools, self.transcript.copy()
        return other

    def add_answer(self, message: Message) -> None:
        """Add an answer, whose tokens are in the transcript already."""
        self._messages.append(message)
        self._encoded = len(self._messages)

    def change_answer(self, message: Message) -> None:
        """Replace the last answer. Its tokens stay as they were sampled."""
        assert self._messages[-1].role == "assistant", "the last message is not the assistant's"
        self._messages[-1] = message

    def snapshot(self) -> Snapshot:
        return Snapshot(tuple(self._messages), self._encoded, len(self.transcript))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to an earlier state."""
        self._messages = list(snapshot.messages)
        self._encoded = snapshot.encoded
        self.transcript.roll_back(snapshot.tokens)

    def _begin_again(self) -> None:
        self.transcript = Transcript()
        self._encoded = 0
