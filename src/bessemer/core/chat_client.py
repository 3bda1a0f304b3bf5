"""Client of chat completions at an OpenAI-compatible URL: ours, a vendor's, another engine's."""

from __future__ import annotations

import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from bessemer.core.errors import BessemerError, ConfigError

#: Answers of a server that another try may change: too many requests, and faults of its own.
_PASSING = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_MOST_BYTES = 16 << 20


class ApiError(BessemerError):
    """An API that cannot be reached, refuses, or answers something else than it should."""


class _PassingError(Exception):
    """A failure that may pass. wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another place."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class ChatClient:
    """Answers prompts by `POST url/chat/completions`.

    url: with the version in it, `https://api.example.com/v1`. key_variable: environment variable that holds the key; empty:
    none is sent. workers: requests at once. attempts: tries of one request; between them it waits `first_wait` seconds, twice
    as long each time, a random part less, or as long as the server asks for.

    Raises ConfigError for a URL that is none or holds a password, and for a variable that is not set.
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
        self._place = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._request = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self._headers = {"Content-Type": "application/json"}
        if key_variable:
            key = os.environ.get(key_variable, "").strip()
            if not key:
                raise ConfigError(f"the environment variable {key_variable} is not set: it holds the key of {self._place}")
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout
        self._attempts = attempts
        self._first_wait = first_wait
        self._workers = workers
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The answer to each prompt, each a conversation of its own.

        Raises ApiError, in one line, for a request that fails for good; those that wait are then not sent.
        """
        stop = threading.Event()
        failures: list[BaseException] = []

        def answer(prompt: str) -> str:
            try:
                return "" if stop.is_set() else self._answer(prompt, stop)
            except BaseException as error:
                failures.append(error)
                stop.set()
                return ""

        with ThreadPoolExecutor(self._workers) as pool:
            try:
                answers = list(pool.map(answer, prompts))
            finally:
                # after an interruption nothing more is sent, and nobody waits to try again
                stop.set()
        if failures:
            raise failures[0]
        return answers

    def _answer(self, prompt: str, stop: threading.Event) -> str:
        body = json.dumps({**self._request, "messages": [{"role": "user", "content": prompt}]}).encode()
        for attempt in range(1, self._attempts + 1):
            try:
                return self._sent(body)
            except _PassingError as error:
                tries = f", {attempt} times" if attempt > 1 else ""
                failure = ApiError(f"{self._place}: {error}{tries}")
                wait = self._first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1) if error.wait is None else error.wait
            if attempt == self._attempts or stop.wait(min(wait, _LONGEST_WAIT)):
                raise failure
        raise AssertionError("unreachable")

    def _sent(self, body: bytes) -> str:
        request = urllib.request.Request(f"{self._place}/chat/completions", body, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} {error.reason}{_said(error)}"
            if error.code in _PASSING:
                raise _PassingError(reason, _retry_after(error.headers)) from None
            raise ApiError(f"{self._place}: {reason}") from None
        except urllib.error.URLError as error:
            raise _PassingError(f"cannot be reached ({error.reason})") from None
        except (OSError, ValueError) as error:
            raise _PassingError(f"broke off ({error or type(error).__name__})") from None
        return self._text(content)

    def _text(self, content: bytes) -> str:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ApiError(f"{self._place}: answered something else than a chat completion: {_start(content)}") from None
        return text if isinstance(text, str) else ""


def _said(error: urllib.error.HTTPError) -> str:
    """What the body of an error says."""
    try:
        content = error.read(_MOST_BYTES)
        found: Any = json.loads(content)
        message = found["error"]["message"] if isinstance(found["error"], Mapping) else found["error"]
        return f" ({' '.join(str(message).split())[:300]})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _retry_after(headers: Message) -> float | None:
    try:
        return max(0.0, float(headers["Retry-After"]))
    except (TypeError, ValueError):
        return None


def _start(content: bytes) -> str:
    return repr(content[:80].decode(errors="replace"))
