"""Client of an HTTP API at one URL: requests with a key; errors say whether the request may be sent again."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from bessemer.core.errors import BessemerError, ConfigError

Result = TypeVar("Result")
#: Status codes after which a request is sent again: too many requests, conflicts, timeouts and faults of the server.
_TRANSIENT = (408, 409, 429, 500, 502, 503, 504)
_MOST_BYTES = 16 << 20
#: Longest wait before a request is sent again, in seconds.
LONGEST_WAIT = 60.0
#: Most characters of a server's or a connection's reason that a message shows.
_LONGEST_REASON = 300


class ApiError(BessemerError):
    """An API that cannot be reached, refuses a request, or sends an unexpected answer. status: of the refusal, where known."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class TransientError(Exception):
    """A failure after which the request is sent again. wait: seconds, from the server's `Retry-After`; is_busy: the server is
    there, and refuses the request for now."""

    def __init__(self, reason: str, wait: float | None = None, *, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.is_busy = is_busy


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class HttpClient:
    """Sends requests below one URL. Any number of threads may use it.

    url: `http://127.0.0.1:8000`, with a path where the API has one. key_variable: environment variable that holds the key, sent
    as `Authorization: Bearer`; empty: none is sent. timeout: seconds for an answer.

    Raises ConfigError for a URL that is none or holds a password or a query, and for a variable that is not set.
    """

    def __init__(self, url: str, *, key_variable: str = "", timeout: float = 120.0, most_bytes: int | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the URL of an API: it begins with http:// or https://")
        if parts.username or parts.password:
            raise ConfigError("the URL of an API holds no password: name the environment variable of the key instead")
        if parts.query or parts.fragment:
            raise ConfigError("the URL of an API ends in its path: what stands behind ? or # would not be sent")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._headers: dict[str, str] = {}
        if key_variable:
            key = os.environ.get(key_variable, "").strip()
            if not key:
                raise ConfigError(f"the environment variable {key_variable} is not set: it holds the key of {self.url}")
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout
        self._most_bytes = most_bytes or _MOST_BYTES
        self._opener = urllib.request.build_opener(_NoRedirects)

    def send(
        self,
        path: str,
        body: bytes | None = None,
        *,
        content_type: str = "application/json",
        timeout: float | None = None,
    ) -> bytes:
        """The response to a POST of `body`, or to a GET where there is none.

        Raises TransientError for a failure after which the request may be sent again, ApiError, in one line, for a refusal.
        """
        headers = self._headers if body is None else {"Content-Type": content_type, **self._headers}
        request = urllib.request.Request(f"{self.url}{path}", body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout if timeout is None else timeout) as response:
                content: bytes = response.read(self._most_bytes)
                # a bounded read does not notice a connection that ends before Content-Length
                if response.length and len(content) < self._most_bytes:
                    raise TransientError(f"broke off ({response.length:,} bytes are missing)")
                return content
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} {error.reason}{_reason(error, self._most_bytes)}"
            if error.code in _TRANSIENT:
                is_busy = error.code in (408, 409, 429, 503)
                raise TransientError(reason, _retry_after(error.headers), is_busy=is_busy) from None
            raise ApiError(f"{self.url}: {reason}", error.code) from None
        except urllib.error.URLError as error:
            raise TransientError(f"cannot be reached ({error.reason})") from None
        except (OSError, ValueError) as error:
            raise TransientError(f"broke off ({error or type(error).__name__})") from None
        except http.client.InvalidURL as error:
            raise ApiError(f"{self.url}: {error}") from None
        except http.client.HTTPException as error:
            # the error quotes the bytes that came instead of HTTP; `repr` escapes their control characters
            raise TransientError(f"broke off ({repr(error)[:_LONGEST_REASON]})") from None

    def post(self, path: str, body: Any, *, timeout: float | None = None) -> Any:
        """The JSON that a POST of JSON is answered with; None where it is no JSON. Raises as `send`."""
        return _json(self.send(path, json.dumps(body).encode(), timeout=timeout))

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """The JSON of a GET; None where it is no JSON. Raises as `send`."""
        return _json(self.send(path, timeout=timeout))


def repeated(request: Callable[[], Result], whose: str, attempts: int, first_wait: float) -> Result:
    """The result of a request, which is sent again after failures that may pass. whose: named when all attempts failed. Raises
    ApiError."""
    for attempt in range(1, attempts + 1):
        try:
            return request()
        except TransientError as error:
            if attempt == attempts:
                raise ApiError(f"{whose}: {error}, {attempt} times") from None
            time.sleep(wait_before(attempt, error, first_wait))
    raise AssertionError("unreachable")


def wait_before(attempt: int, error: TransientError, first_wait: float) -> float:
    """Seconds before a request is sent again: as long as the server says, or else `first_wait`, doubled with each attempt from
    1 and shortened at random."""
    wait = first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1) if error.wait is None else error.wait
    return min(wait, LONGEST_WAIT)


def start_of(content: bytes) -> str:
    """The beginning of an answer, for a message about it."""
    return repr(content[:80].decode(errors="replace"))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _reason(error: urllib.error.HTTPError, most_bytes: int) -> str:
    """The reason in an error's body, in brackets; empty when there is none."""
    try:
        content = error.read(most_bytes)
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
