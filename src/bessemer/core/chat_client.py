"""Client of chat completions at an OpenAI-compatible URL: ours, a vendor's, another engine's."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias, TypeVar

from bessemer.core.http_client import ApiError, HttpClient, TransientError, start_of, wait_before

__all__ = ["ApiError", "ChatClient", "ChatModel", "ChatPrompt", "CutText", "FilteredText", "messages_of", "with_json_arguments"]

#: `top_logprobs` of a request that chooses an option: the most that common servers return.
_LIKELIEST = 20
#: Characters that may surround an answer of one letter: `(A)`, `A.`, `**A**`.
_MARKUP = " \t\n*_`().:\"'"

#: A prompt: the text of one user message, or a conversation.
ChatPrompt: TypeAlias = str | Sequence[Mapping[str, Any]]
Read = TypeVar("Read")


class CutText(str):
    """An answer that was cut at the token limit. Methods such as `strip` return a plain `str`."""

    __slots__ = ()


class FilteredText(str):
    """An answer that the server ended for what it says (`content_filter`). Methods such as `strip` return a plain `str`."""

    __slots__ = ()


class ChatModel(Protocol):
    """A model that answers conversations: at a URL (`ChatClient`), or on this machine (`inference.chat.EngineChat`)."""

    def ask(self, prompts: Sequence[ChatPrompt], seeds: Sequence[int] | None = None) -> list[str]:
        """The answer to each prompt, each a conversation of its own; a `CutText` where it was cut at the token limit, a
        `FilteredText` where a server's filter ended it.

        seeds: one for each prompt, for sampled answers.
        """

    def choose(self, prompts: Sequence[ChatPrompt], options: Sequence[str]) -> list[list[float] | None]:
        """The probability of each option as the beginning of the answer to a prompt, normalised over the options.

        options: short texts, such as letters. None where the model gives no option a probability.
        """


class ChatClient:
    """Answers prompts by `POST url/chat/completions`.

    url: with the version in it, `https://api.example.com/v1`. key_variable: environment variable that holds the key; empty:
    none is sent. workers: requests at once. attempts: of one request. Between attempts it waits as long as the server says, or
    else `first_wait` seconds, doubled each time and shortened at random.

    Raises ConfigError for a URL that is none or holds a password or a query, and for a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "",
        max_tokens: int = 512,
        temperature: float = 0.0,
        timeout: float = 120.0,
        attempts: int = 5,
        first_wait: float = 1.0,
        workers: int = 4,
    ) -> None:
        self._client = HttpClient(url, key_variable=key_variable, timeout=timeout)
        self._url = self._client.url
        self._request = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self._attempts = attempts
        self._first_wait = first_wait
        self._workers = workers

    def ask(self, prompts: Sequence[ChatPrompt], seeds: Sequence[int] | None = None) -> list[str]:
        """As of `ChatModel`; "" for an answer without text.

        seeds: one for each prompt; servers get the lower 31 bits. Raises ApiError, in one line, when a request fails for good;
        waiting requests are then not sent.
        """
        of_prompts = [{}] * len(prompts) if seeds is None else [{"seed": seed % 2**31} for seed in seeds]
        bodies = [
            {**self._request, **seed, "messages": messages_of(prompt)} for prompt, seed in zip(prompts, of_prompts, strict=True)
        ]
        return self._all(bodies, self._text)

    def choose(self, prompts: Sequence[ChatPrompt], options: Sequence[str]) -> list[list[float] | None]:
        """As of `ChatModel`, by the log-probabilities of the first token. If the server returns none, the option that it
        answers has probability 1. Raises as `ask`."""
        request = {**self._request, "max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": _LIKELIEST}
        bodies = [{**request, "messages": messages_of(prompt)} for prompt in prompts]
        return self._all(bodies, lambda content: self._probabilities(content, options))

    def _all(self, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes], Read]) -> list[Read]:
        """`read` of the response to each request; `workers` of them are in flight at once."""
        stop = threading.Event()
        failures: list[BaseException] = []

        def answer(body: Mapping[str, Any]) -> list[Read]:
            try:
                return [] if stop.is_set() else [read(self._response(json.dumps(body).encode(), stop))]
            except BaseException as error:
                failures.append(error)
                stop.set()
                return []

        with ThreadPoolExecutor(self._workers) as pool:
            try:
                answers = list(pool.map(answer, bodies))
            finally:
                # after an interruption no request is sent, and waits between attempts end
                stop.set()
        if failures:
            raise failures[0]
        return [one for (one,) in answers]

    def answer(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The answer to a conversation as the API gives it: `message`, an object, and `finish_reason`. Raises ApiError."""
        request = {**self._request, "messages": list(messages), **({"tools": list(tools)} if tools else {})}
        return self._choice(self._response(json.dumps(request).encode(), threading.Event()))

    def _response(self, body: bytes, stop: threading.Event) -> bytes:
        for attempt in range(1, self._attempts + 1):
            try:
                return self._client.send("/chat/completions", body)
            except TransientError as error:
                tries = f", {attempt} times" if attempt > 1 else ""
                failure = ApiError(f"{self._url}: {error}{tries}")
                wait = wait_before(attempt, error, self._first_wait)
            if attempt == self._attempts or stop.wait(wait):
                raise failure
        raise AssertionError("unreachable")

    def _text(self, content: bytes) -> str:
        choice = self._choice(content)
        given = choice["message"].get("content")
        # JSON can hold half of a surrogate pair, which has no UTF-8
        text = given.encode("utf-8", "replace").decode("utf-8") if isinstance(given, str) else ""
        reason = choice.get("finish_reason")
        return CutText(text) if reason == "length" else FilteredText(text) if reason == "content_filter" else text

    def _choice(self, content: bytes) -> dict[str, Any]:
        try:
            choice = json.loads(content)["choices"][0]
            if isinstance(choice["message"], dict):
                return dict(choice)
        except (ValueError, LookupError, TypeError):
            pass
        raise ApiError(f"{self._url}: answered something else than a chat completion: {start_of(content)}")

    def _probabilities(self, content: bytes, options: Sequence[str]) -> list[float] | None:
        answer = self._text(content).strip(_MARKUP)
        totals = [0.0] * len(options)
        try:
            for likely in json.loads(content)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                token = likely["token"].strip()
                if token in options:
                    totals[options.index(token)] += math.exp(likely["logprob"])
        except (LookupError, TypeError):
            totals = [float(option == answer) for option in options]
        whole = sum(totals)
        return [total / whole for total in totals] if whole else None


def messages_of(prompt: ChatPrompt) -> list[dict[str, Any]]:
    """A prompt as messages: a text becomes one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def with_json_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the arguments of calls as strings of JSON, as APIs take them, and without thinking."""
    api_messages = []
    for message in messages:
        calls = [
            {
                **call,
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
            }
            for call in message.get("tool_calls", ())
        ]
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content")}
        api_messages.append(plain | ({"tool_calls": calls} if calls else {}))
    return api_messages
