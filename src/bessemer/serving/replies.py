"""Responses to plain completions: whole, or event by event."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.inference.request import Chunk, Completion
from bessemer.inference.sampling.sampler import Sampled
from bessemer.serving.log_probs import CompletionLogProbs, joined
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Echo:
    """A prompt that is shown before its completion."""

    text: str
    tokens: list[int]


class CompletionReply:
    """The response to a request: one choice for each completion, and the tokens they took.

    Completion i of prompt p is choice p · n + i.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        *,
        log_probs: bool = False,
        echoes: Sequence[Echo | None] = (None,),
        n: int = 1,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """prompt_tokens: of all prompts. log_probs: whether the client asked for them. echoes: of each prompt. n: completions
        of each. prompt_ids: of each prompt, where the client asked for the ids of all tokens."""
        self._model = model
        self._tokenizer = tokenizer
        self.tells_log_probs = log_probs
        self._echoes = echoes
        self._n = n
        self._created = int(time.time())
        self._identity = uuid.uuid4().hex
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._forms = [CompletionLogProbs(tokenizer) for _ in range(len(echoes) * n)]
        self._begun: set[int] = set()
        self._shows_ids = prompt_ids is not None
        #: Of each choice, the ids of its prompt until the client has been told them.
        self._prompt_ids = {place: prompt_ids[place // n] for place in range(len(echoes) * n)} if prompt_ids is not None else {}
        #: Of each choice, ids that the client has not been told.
        self._ids: list[list[int]] = [[] for _ in range(len(echoes) * n)]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The response of a request that does not stream. completions: the first of each prompt, with its `others`."""
        choices: list[dict[str, Any]] = []
        for completion in completions:
            for one in (completion, *completion.others):
                index = len(choices)
                self._completion_tokens += one.completion_tokens
                text, log_probs = self._part(index, one.text, one.log_probs or [], completion.prompt_log_probs or [])
                self._ids[index] += one.token_ids
                choices.append(self._choice(index, text, log_probs, one.finish_reason))
        cached_tokens = sum(completion.cached_tokens for completion in completions)
        return {**self._head(), "choices": choices, "usage": self._usage(cached_tokens)}

    def events(self, arrived: Iterable[tuple[int, Chunk]], prompts: Sequence[Sequence[Sampled]]) -> Iterator[dict[str, Any]]:
        """Events for the chunks of one or more steps: some text of a choice, and the reason it ended. prompts: of each, the
        log-probabilities of its tokens but the first, where they were asked for."""
        of_choice: dict[int, list[Chunk]] = {}
        for index, chunk in arrived:
            of_choice.setdefault(index, []).append(chunk)
        for index, chunks in of_choice.items():
            self._completion_tokens += sum(len(chunk.token_ids) for chunk in chunks)
            self._ids[index] += [id for chunk in chunks for id in chunk.token_ids]
            sampled = [one for chunk in chunks for one in chunk.log_probs or []]
            text, log_probs = self._part(index, "".join(chunk.text for chunk in chunks), sampled, prompts[index // self._n])
            if text or log_probs:
                yield self._event(index, text, log_probs)
            if (finish_reason := chunks[-1].finish_reason) is not None:
                yield self._event(index, "", None, finish_reason)

    def usage_event(self, cached_tokens: int) -> dict[str, Any]:
        """The event before the end for a client that asked for its usage."""
        return {**self._head(), "choices": [], "usage": self._usage(cached_tokens)}

    def _head(self) -> dict[str, Any]:
        return {"id": f"cmpl-{self._identity}", "object": "text_completion", "created": self._created, "model": self._model}

    def _usage(self, cached_tokens: int) -> dict[str, Any]:
        """Tokens as the model sees them, end tokens included; of a prompt once, however many choices."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def _event(
        self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {**self._head(), "choices": [self._choice(index, text, log_probs, finish_reason)]}

    def _choice(self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        """A choice, with the ids that have not been told: of its prompt once, as vLLM does."""
        choice = {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}
        if not self._shows_ids:
            return choice
        ids, self._ids[index] = self._ids[index], []
        prompt = {"prompt_token_ids": list(self._prompt_ids.pop(index))} if index in self._prompt_ids else {}
        return {**choice, "token_ids": ids, **prompt}

    def _part(
        self, index: int, text: str, sampled: Sequence[Sampled], prompt: Sequence[Sampled]
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of a choice's next part; its first has the echo of the prompt before it."""
        echo = self._echoes[index // self._n] if index not in self._begun else None
        self._begun.add(index)
        if echo is not None:
            text = echo.text + text
        if not self.tells_log_probs:
            return text, None
        form = self._forms[index]
        shown = form.of_prompt(echo.tokens, prompt) if echo is not None else None
        made = form.of(sampled)
        return text, joined(shown, made) if shown is not None else made if sampled else None
