"""HTTP requests with limits, and politeness: robots.txt (RFC 9309), crawl delays, objections to training.

Limits are on addresses, time and size. Written on the standard library's connection, because the address that is checked must
be the one connected to: a name that resolves to a public address when it is checked and to a private one when it is used would
pass any check before.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from protego import Protego

from bessemer.data.sources.source import TRAINING_ROBOTS

T = TypeVar("T")

_PORTS = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}
_REDIRECTS = (301, 302, 303, 307, 308)
_WORTH_RETRYING = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 16
_LONGEST_WAIT = 120.0
_MOST_ADDRESSES = 4
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(Exception):
    """A request that brought nothing. `kind` is what it is counted under; `again` says whether a later try may help."""

    def __init__(self, kind: str, why: str, *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(why)
        self.kind = kind
        self.again = again
        self.wait = wait


@dataclass(frozen=True)
class Limits:
    """Limits of one request: on time, size, redirects, retries and addresses."""

    user_agent: str
    seconds: float = 30.0
    max_bytes: int = 16 << 20
    max_redirects: int = 5
    retries: int = 3
    allow_private: bool = False


@dataclass(frozen=True)
class Response:
    """Response of a server, its body decoded by `Content-Encoding`."""

    url: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes = field(repr=False)

    def header(self, name: str) -> str | None:
        """The first header of this name."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(frozen=True)
class Clock:
    """Clock for waiting; tests replace it."""

    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


#: Packages all of whose errors count as network errors.
_NETWORK_CLIENTS = frozenset({"aiohttp", "httpcore", "httpx", "requests", "urllib3"})
#: System errors that trying again does not mend.
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def may_pass(error: BaseException) -> bool:
    """Whether an error of other people's code may be a network's, so that waiting and trying again may help."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return (isinstance(error, OSError) and not isinstance(error, _LASTING)) or not packages.isdisjoint(_NETWORK_CLIENTS)


def growing_wait(attempt: int, least: float = 0.0) -> float:
    """Seconds to wait before the next attempt after the one of this number, from 0: doubled each time, at least `least`."""
    return min(max(least, 2.0**attempt), _LONGEST_WAIT)


def tried_again(call: Callable[[], T], retries: int, clock: Clock) -> T:
    """The result of `call`, retried after growing waits where a network may have failed it. Raises its last error."""
    for attempt in range(retries):
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            clock.sleep(growing_wait(attempt))
    return call()


def normal_url(url: str) -> str:
    """An address with its host in lower case and its path and query quoted, without a fragment but one of `#!`, which names a
    page of its own. Raises FetchError for one that is not http or https, has no host, or carries a password."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FetchError("bad_addresses", str(error)) from None
    if parts.scheme.lower() not in ("http", "https"):
        raise FetchError("bad_addresses", f"not http or https: {parts.scheme or 'no scheme'}")
    if not host or parts.username is not None or any(character.isspace() or ord(character) < 33 for character in host):
        raise FetchError("bad_addresses", "no host, or a name and password in the address")
    try:
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise FetchError("bad_addresses", f"{host!r} is no host's name") from None
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    safe = "%/:=&?~#+!$,;'@()*[]"
    path, query = quote(parts.path or "/", safe=safe), quote(parts.query, safe=safe)
    fragment = quote(parts.fragment, safe=safe) if parts.fragment.startswith("!") else ""
    return urlunsplit((parts.scheme.lower(), place, path, query, fragment))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also when it is dressed as IPv6."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch_once(url: str, limits: Limits, extra: Mapping[str, str] | None = None) -> Response:
    """The answer to a GET, whatever its status; redirects are not followed. Raises FetchError when the address is refused, the
    server cannot be reached, or the answer is too slow or too long."""
    url = normal_url(url)
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    raw = _connected(_resolved(host, port, limits.allow_private), limits.seconds)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        try:
            raw.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # a limit on the whole answer: a server may send a byte a minute, each within the socket's timeout
    watch = threading.Timer(limits.seconds, give_up)
    watch.daemon = True
    watch.start()
    try:
        with raw:
            connection = _connection(parts.scheme, host, port, raw)
            headers = {"User-Agent": limits.user_agent, "Accept-Encoding": "gzip", "Accept": "*/*", "Connection": "close"}
            connection.request("GET", url[url.index("/", 8) :].partition("#")[0], headers=headers | dict(extra or {}))
            response = connection.getresponse()
            sent = [(name, value) for name, value in response.getheaders()]
            body = _body(response, limits.max_bytes)
            if late.is_set():
                raise FetchError("timed_out", f"took more than {limits.seconds:g} seconds", again=True)
            return Response(url, response.status, sent, body)
    except ssl.SSLCertVerificationError as error:
        raise FetchError("bad_certificates", error.verify_message) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise FetchError("timed_out", f"took more than {limits.seconds:g} seconds", again=True) from None
        raise FetchError("broken_answers", f"{type(error).__name__}: {error}", again=True) from None
    finally:
        watch.cancel()


#: Family and address of a socket, as `getaddrinfo` gives them.
_Place = tuple[int, tuple[Any, ...]]


def _resolved(host: str, port: int, allow_private: bool) -> list[_Place]:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError("unreachable", f"{host} is not known ({error})", again=True) from None
    addresses = sorted({str(place[4][0]) for place in infos})
    if not allow_private and not all(map(is_public, addresses)):
        raise FetchError("private_addresses", f"{host} lies at {', '.join(addresses)}, inside a network")
    return [(family, address) for family, _, _, _, address in infos]


def _connected(places: list[_Place], seconds: float) -> socket.socket:
    """A connection to the first place that answers."""
    failed = ""
    for family, address in places[:_MOST_ADDRESSES]:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(seconds)
        try:
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failed = str(error)
    raise FetchError("unreachable", failed or "no address", again=True)


def _connection(scheme: str, host: str, port: int, raw: socket.socket) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(host, port)
    # so that the `Host` header names other ports only
    connection.default_port = _PORTS[scheme]
    connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if scheme == "https" else raw
    return connection


def _body(response: http.client.HTTPResponse, limit: int) -> bytes:
    """The body, expanded where it is gzip, with both sizes limited."""
    expand = zlib.decompressobj(31) if (response.getheader("Content-Encoding") or "").strip().lower() == "gzip" else None
    chunks, size, received = [], 0, 0
    while block := response.read(_BLOCK):
        received += len(block)
        try:
            data = expand.decompress(block, limit + 1 - size) if expand else block
        except zlib.error as error:
            raise FetchError("broken_answers", f"its gzip is damaged ({error})") from None
        chunks.append(data)
        size += len(data)
        if size > limit or received > limit:
            raise FetchError("too_large", f"over {limit:,} bytes")
    if expand and not expand.eof:
        raise FetchError("broken_answers", "its gzip is cut off", again=True)
    return b"".join(chunks)


def fetch(
    url: str,
    limits: Limits,
    *,
    may_visit: Callable[[str], None] = lambda url: None,
    extra: Mapping[str, str] | None = None,
    clock: Clock = Clock(),
    expected: tuple[int, ...] = (200,),
) -> Response:
    """The answer with one of the `expected` statuses, after redirects and, where it may help, after waiting and trying again.

    `may_visit` is called before each request, redirects included; it may wait, and raises FetchError to refuse.
    Raises FetchError when nothing came.
    """
    for attempt in range(limits.retries + 1):
        try:
            return _followed(url, limits, may_visit, extra, expected)
        except FetchError as error:
            if not error.again or attempt == limits.retries:
                raise
            clock.sleep(growing_wait(attempt, error.wait))
    raise AssertionError("the last attempt returns or raises")


def _followed(
    url: str, limits: Limits, may_visit: Callable[[str], None], extra: Mapping[str, str] | None, expected: tuple[int, ...]
) -> Response:
    current = normal_url(url)
    for _ in range(limits.max_redirects + 1):
        may_visit(current)
        answer = fetch_once(current, limits, extra)
        if answer.status in expected:
            return answer
        target = answer.header("Location")
        if answer.status in _REDIRECTS and target:
            current = normal_url(urljoin(current, target))
            continue
        again = answer.status in _WORTH_RETRYING
        raise FetchError(f"status_{answer.status}", f"status {answer.status}", again=again, wait=_retry_after(answer))
    raise FetchError("too_many_redirects", f"more than {limits.max_redirects} redirects")


def _retry_after(answer: Response) -> float:
    """The seconds that a server asks to wait, from `Retry-After` as a number or a date; 0 where it does not."""
    value = (answer.header("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0) if value else 0.0
    except (ValueError, TypeError, OverflowError):
        return 0.0


_LARGEST_RULES = 500 << 10
_LONGEST_DELAY = 60.0


@dataclass(frozen=True)
class _Rules:
    robots: Protego
    training: Protego | None
    delay: float


class Politeness:
    """The rules and the pace of every host that is visited; safe to use from several threads."""

    def __init__(self, limits: Limits, delay_seconds: float, clock: Clock | None = None) -> None:
        self._limits = limits
        self._delay = delay_seconds
        self._clock = clock or Clock()
        self._rules: dict[str, _Rules] = {}
        self._next_visit: dict[str, float] = {}
        self._lock = threading.Lock()
        self._agent = limits.user_agent.split("/")[0].split(" ")[0]

    def may_visit(self, url: str) -> None:
        """Wait until the next request to the host is due. Raises FetchError when its robots.txt forbids the address."""
        rules = self._rules_of(url)
        if not rules.robots.can_fetch(url, self._agent):
            raise FetchError("forbidden_by_robots", "its robots.txt forbids it")
        self._wait(_origin(url), max(self._delay, rules.delay))

    def opt_out(self, url: str) -> str | None:
        """The host's objections to training on a page, in its robots.txt or ai.txt."""
        rules = self._rules_of(url)
        signs = []
        if not all(rules.robots.can_fetch(url, robot) for robot in TRAINING_ROBOTS):
            signs.append("robots.txt closed to training")
        if rules.training is not None and not rules.training.can_fetch(url, self._agent):
            signs.append("ai.txt")
        return ", ".join(signs) or None

    def sitemaps(self, url: str) -> list[str]:
        """The sitemaps that a host's robots.txt names."""
        return list(self._rules_of(url).robots.sitemaps)

    def _wait(self, origin: str, delay: float) -> None:
        with self._lock:
            now = self._clock.now()
            turn = max(now, self._next_visit.get(origin, now))
            self._next_visit[origin] = turn + delay
        if turn > now:
            self._clock.sleep(turn - now)

    def _rules_of(self, url: str) -> _Rules:
        origin = _origin(url)
        with self._lock:
            known = self._rules.get(origin)
        if known is None:
            robots = self._robots(origin)
            delay = min(float(robots.crawl_delay(self._agent) or 0.0), _LONGEST_DELAY)
            known = _Rules(robots, self._training_rules(origin), delay)
            with self._lock:
                known = self._rules.setdefault(origin, known)
        return known

    def _robots(self, origin: str) -> Protego:
        """The rules; all is allowed where there are none, nothing where the server fails (RFC 9309, 2.3.1)."""
        try:
            return Protego.parse(self._file(f"{origin}/robots.txt"))
        except FetchError as error:
            if error.kind in ("private_addresses", "bad_addresses"):
                raise
            missing = error.kind.startswith("status_4") and error.kind != "status_429"
            return Protego.parse("" if missing or error.kind == "too_large" else "User-agent: *\nDisallow: /")

    def _training_rules(self, origin: str) -> Protego | None:
        try:
            text = self._file(f"{origin}/ai.txt")
        except FetchError:
            return None
        return Protego.parse(text) if "user-agent" in text.lower() and "<html" not in text[:2000].lower() else None

    def _file(self, url: str) -> str:
        self._wait(_origin(url), self._delay)
        answer = fetch(url, self._limits, clock=self._clock)
        return answer.body[:_LARGEST_RULES].decode("utf-8", errors="replace")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
