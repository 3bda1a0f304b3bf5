"""Client of chat completions at an OpenAI-compatible URL: ours, a vendor's, another engine's."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import IO, Any, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

from bessemer.core.errors import BessemerError, ConfigError

#: Status codes after which a request is sent again: too many requests, conflicts, timeouts and faults of the server.
_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_MOST_BYTES = 16 << 20
#: Most characters of a server's or a connection's reason that a message shows.
_LONGEST_REASON = 300
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


class ChatModel(Protocol):
    """A model that answers conversations: at a URL (`ChatClient`), or on this machine (`inference.chat.EngineChat`)."""

    def ask(self, prompts: Sequence[ChatPrompt], seeds: Sequence[int] | None = None) -> list[str]:
        """The answer to each prompt, each a conversation of its own; a `CutText` where it was cut at the token limit.

        seeds: one for each prompt, for sampled answers.
        """

    def choose(self, prompts: Sequence[ChatPrompt], options: Sequence[str]) -> list[list[float] | None]:
        """The probability of each option as the beginning of the answer to a prompt, normalised over the options.

        options: short texts, such as letters. None where the model gives no option a probability.
        """


class ApiError(BessemerError):
    """An API that cannot be reached, refuses a request, or sends an unexpected answer."""


class _TransientError(Exception):
    """A failure after which the request is sent again. wait: seconds, from the server's `Retry-After`."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the URL of an API: it begins with http:// or https://")
        if parts.username or parts.password:
            raise ConfigError("the URL of an API holds no password: name the environment variable of the key instead")
        if parts.query or parts.fragment:
            raise ConfigError("the URL of an API ends in its path: what stands behind ? or # would not be sent")
        self._url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._request = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self._headers = {"Content-Type": "application/json"}
        if key_variable:
            key = os.environ.get(key_variable, "").strip()
            if not key:
                raise ConfigError(f"the environment variable {key_variable} is not set: it holds the key of {self._url}")
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout
        self._attempts = attempts
        self._first_wait = first_wait
        self._workers = workers
        self._opener = urllib.request.build_opener(_NoRedirects)

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
                return self._sent(body)
            except _TransientError as error:
                tries = f", {attempt} times" if attempt > 1 else ""
                failure = ApiError(f"{self._url}: {error}{tries}")
                wait = self._first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1) if error.wait is None else error.wait
            if attempt == self._attempts or stop.wait(min(wait, _LONGEST_WAIT)):
                raise failure
        raise AssertionError("unreachable")

    def _sent(self, body: bytes) -> bytes:
        request = urllib.request.Request(f"{self._url}/chat/completions", body, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content: bytes = response.read(_MOST_BYTES)
                # a bounded read does not notice a connection that ends before Content-Length
                if response.length and len(content) < _MOST_BYTES:
                    raise _TransientError(f"broke off ({response.length:,} bytes are missing)")
                return content
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} {error.reason}{_reason(error)}"
            if error.code in _TRANSIENT:
                raise _TransientError(reason, _retry_after(error.headers)) from None
            raise ApiError(f"{self._url}: {reason}") from None
        except urllib.error.URLError as error:
            raise _TransientError(f"cannot be reached ({error.reason})") from None
        except (OSError, ValueError) as error:
            raise _TransientError(f"broke off ({error or type(error).__name__})") from None
        except http.client.InvalidURL as error:
            raise ApiError(f"{self._url}: {error}") from None
        except http.client.HTTPException as error:
            # the error quotes the bytes that came instead of HTTP; `repr` escapes their control characters
            raise _TransientError(f"broke off ({repr(error)[:_LONGEST_REASON]})") from None

    def _text(self, content: bytes) -> str:
        choice = self._choice(content)
        given = choice["message"].get("content")
        # JSON can hold half of a surrogate pair, which has no UTF-8
        text = given.encode("utf-8", "replace").decode("utf-8") if isinstance(given, str) else ""
        return CutText(text) if choice.get("finish_reason") == "length" else text

    def _choice(self, content: bytes) -> dict[str, Any]:
        try:
            choice = json.loads(content)["choices"][0]
            if isinstance(choice["message"], dict):
                return dict(choice)
        except (ValueError, LookupError, TypeError):
            pass
        raise ApiError(f"{self._url}: answered something else than a chat completion: {_start(content)}")

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


def _reason(error: urllib.error.HTTPError) -> str:
    """The reason in an error's body, in brackets; empty when there is none."""
    try:
        content = error.read(_MOST_BYTES)
        error_object: Any = json.loads(content)["error"]
        message = error_object["message"] if isinstance(error_object, Mapping) else error_object
        return f" ({' '.join(str(message).split())[:_LONGEST_REASON]})"
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return ""


def _retry_after(headers: Message) -> float | None:
    try:
        return max(0.0, float(headers["Retry-After"]))
    except (TypeError, ValueError):
        return None


def _start(content: bytes) -> str:
    return repr(content[:80].decode(errors="replace"))
