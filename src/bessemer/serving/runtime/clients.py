"""Clients, their API keys, and their rate limits.

A file holds the hashes of the keys and the rights of each. The keys themselves are stored nowhere.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from fastapi import Request
from starlette.types import Receive

from bessemer.assistant.conversation import Principal
from bessemer.core.config import Config, setting
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.hashing import hash_bytes
from bessemer.core.store import read_json, write_json
from bessemer.serving.runtime.bodies import ApiError

#: Key of the caller in a request's ASGI scope, where the gate puts it.
SCOPE = "bessemer.caller"
#: Version of the file's format.
_FORMAT = 1
_PREFIX = "bsk-"
_log = logging.getLogger(__name__)


class Allowance:
    """Token bucket: at most `per_minute` units a minute, refilled evenly.

    Generated tokens are counted afterwards, so the bucket may be overdrawn.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._filled_at = clock()

    @property
    def wait(self) -> float:
        """Seconds until a unit may be spent."""
        self._refill()
        return max(0.0, (1 - self._left) * 60 / self.per_minute)

    def spend(self, units: int) -> None:
        """Take units, even more than are left."""
        self._refill()
        self._left -= units

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._filled_at) * self.per_minute / 60)
        self._filled_at = now


@dataclass(eq=False)
class Client:
    """The holder of a key, or everybody on a server without keys.

    id: owner of stored responses. is_admin: may load adapters and see runs. salt: separates their part of the prefix cache;
    None: the shared part. requests, tokens: allowances a minute; None: no limit.
    """

    principal: Principal
    id: str = ""
    is_admin: bool = False
    salt: str | None = None
    requests: Allowance | None = None
    tokens: Allowance | None = None
    #: Set when the key is revoked; its requests then end.
    revoked: asyncio.Event = field(default_factory=asyncio.Event)

    def priority(self, wanted: int) -> int:
        """The priority of a request, lower is more urgent. Raises ApiError (403) for one before everybody else's, which on a
        server with keys is an admin's to ask for."""
        if wanted < 0 and self.id and not self.is_admin:
            raise ApiError(
                "a priority below 0 goes before other clients' requests; it needs an admin's key",
                status=403,
                parameter="priority",
                code="not_allowed",
            )
        return wanted

    def take_request(self) -> None:
        """Count a request. Raises ApiError (429) when an allowance is used up."""
        for allowance, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if allowance is not None and (wait := allowance.wait) > 0:
                seconds = math.ceil(wait)
                raise ApiError(
                    f"this key may use {allowance.per_minute:,} {what} a minute; try again in {seconds} s",
                    status=429,
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(seconds)},
                )
        if self.requests is not None:
            self.requests.spend(1)


@dataclass(eq=False)
class Caller:
    """One request's client, and the tokens that the request has used.

    on_spend: called when they grow. headers: of the response. held: resources of the request, closed by the gate when the
    response is sent or the client has left. receive: gives the request's messages, behind its body those of the connection;
    None where another process has it.
    """

    client: Client
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    on_spend: Callable[[], None] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)
    receive: Receive | None = None

    def spend(self, *, prompt: int = 0, completion: int = 0) -> None:
        """Count tokens, also for the client's allowance."""
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if self.client.tokens is not None:
            self.client.tokens.spend(prompt + completion)
        if self.on_spend is not None:
            self.on_spend()

    def salt(self, given: str | None) -> str | None:
        """The prefix cache's salt, from the client's and the request's own: other clients never share the result."""
        if self.client.salt is None or given is None:
            return self.client.salt or given
        return hash_bytes(self.client.salt.encode(), given.encode())


def caller_of(request: Request) -> Caller:
    """The caller, which the gate has put into the scope."""
    caller = request.scope[SCOPE]
    assert isinstance(caller, Caller)
    return caller


class KeyRecord(Config):
    """A key in the file."""

    name: str = setting(description="of the key, which is shown and logged", min_length=1)
    hash: str = setting(description="SHA-256 of the key, hexadecimal", pattern="^[0-9a-f]{64}$")
    user: str | None = setting(None, "in whose name its requests are made; by default the key's name")
    groups: list[str] = setting(default_factory=list, description="of the user: which tools and documents are open to them")
    admin: bool = setting(False, "whether it may load and unload adapters, and see runs and their documents")
    requests_per_minute: int | None = setting(None, "most requests in a minute", unit="requests", ge=1)
    tokens_per_minute: int | None = setting(None, "most tokens of prompts and answers in a minute", unit="tokens", ge=1)

    def client(self) -> Client:
        """A client with full allowances and its own part of the prefix cache."""
        principal = Principal(self.user or self.name, frozenset(self.groups), key=self.name)
        return Client(
            principal,
            self.hash,
            self.admin,
            salt=self.hash,
            requests=None if self.requests_per_minute is None else Allowance(self.requests_per_minute),
            tokens=None if self.tokens_per_minute is None else Allowance(self.tokens_per_minute),
        )


def hash_key(key: str) -> str:
    """SHA-256 of a key. A key has 256 random bits, so its hash needs neither salt nor a slow function."""
    return sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A random key."""
    return _PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> list[KeyRecord]:
    """The keys of a file. Raises ArtefactError for a missing or damaged file, ConfigError for a mistake in it."""
    written = read_json(path, "file of API keys")
    if not isinstance(written, Mapping) or written.get("format") != _FORMAT or not isinstance(written.get("keys"), list):
        raise ConfigError(f"{path}: not a file of API keys; bessemer keys add {path} NAME makes one")
    records = [KeyRecord.parse(values, f"{path}: keys.{place}") for place, values in enumerate(written["keys"])]
    names = [record.name for record in records]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path}: two keys are called '{twice}'")
    return records


def write_keys(path: Path, records: Sequence[KeyRecord]) -> None:
    """Write a file of keys, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": _FORMAT, "keys": [record.model_dump(mode="json") for record in records]})
    path.chmod(0o600)


class Keys:
    """The clients of a server with keys: those of a file, and perhaps one key from the command line."""

    def __init__(self, path: Path | None = None, single: str | None = None) -> None:
        """Raises as `read_keys`."""
        self._path = path
        self._single = {} if single is None else {hash_key(single): Client(Principal("key"), hash_key(single))}
        self._clients: dict[str, Client] = dict(self._single)
        self._records: list[KeyRecord] = []
        self._seen: tuple[int, int] | None = None
        if path is not None:
            self._take(read_keys(path))
            self._seen = self._state()

    def client(self, given: Sequence[str]) -> Client | None:
        """The client of one of the given keys; None for unknown keys.

        Compares every key with every hash, each in constant time.
        """
        hashes = [hash_key(key) for key in given]
        match = None
        for known, client in self._clients.items():
            if sum(hmac.compare_digest(known, hash) for hash in hashes):
                match = client
        return match

    def refresh(self) -> None:
        """Read the file again if it has changed, and set `revoked` of clients whose key is gone.

        An unreadable file changes nothing, and is logged. Call it on the server's event loop.
        """
        if self._path is None or (state := self._state()) == self._seen:
            return
        self._seen = state
        try:
            records = read_keys(self._path)
        except (BessemerError, OSError) as error:
            _log.warning("the keys stay as they were: %s", error)
            return
        self._take(records)

    def _take(self, records: list[KeyRecord]) -> None:
        before = {record.hash: record for record in self._records}
        clients = dict(self._single)
        for record in records:
            client = clients[record.hash] = self._clients.get(record.hash) or record.client()
            # an unchanged record keeps its allowances
            if before.get(record.hash, record) != record:
                changed = record.client()
                client.principal, client.is_admin = changed.principal, changed.is_admin
                client.requests, client.tokens = changed.requests, changed.tokens
        for hash, client in self._clients.items():
            if hash not in clients:
                client.revoked.set()
        self._clients, self._records = clients, records

    def _state(self) -> tuple[int, int] | None:
        assert self._path is not None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
