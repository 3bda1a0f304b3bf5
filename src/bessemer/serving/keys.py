"""API keys: a file of their hashes, with what each may do. The keys themselves are kept nowhere."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from bessemer.assistant.principal import Principal
from bessemer.core.config import Config, setting
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.store import read_json, write_json
from bessemer.serving.clients import Allowance, Client

_log = logging.getLogger(__name__)

#: Format number of the file.
_FORMAT = 1
_PREFIX = "bsk-"


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
        """A client with full allowances, and a part of the prefix cache of its own."""
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
    """SHA-256 of a key. A key is 256 random bits, so that its hash needs neither a salt nor a slow function."""
    return sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A random key."""
    return _PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> list[KeyRecord]:
    """The keys of a file. Raises ArtefactError for a file that is missing or damaged, ConfigError for what is wrong in it."""
    written = read_json(path, "file of API keys")
    if not isinstance(written, Mapping) or written.get("format") != _FORMAT or not isinstance(written.get("keys"), list):
        raise ConfigError(f"{path}: not a file of API keys; bessemer keys add {path} NAME makes one")
    records = [KeyRecord.parse(values, f"{path}: keys.{place}") for place, values in enumerate(written["keys"])]
    names = [record.name for record in records]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path}: two keys are called '{twice}'")
    return records


def write_keys(path: Path, records: Sequence[KeyRecord]) -> None:
    """Write a file of keys, for its owner's eyes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": _FORMAT, "keys": [record.model_dump(mode="json") for record in records]})
    path.chmod(0o600)


class Keys:
    """The clients of a server that asks for keys: those of a file, and perhaps one key that stands in no file."""

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
        """The client of one of the keys that a request carries; None where none is known.

        Every key given is compared with every hash, each in constant time.
        """
        hashes = [hash_key(key) for key in given]
        found = None
        for known, client in self._clients.items():
            if sum(hmac.compare_digest(known, hash) for hash in hashes):
                found = client
        return found

    def refresh(self) -> None:
        """Read the file again where it has changed. Clients whose key is gone are told by `revoked`.

        A file that cannot be read changes nothing, and is logged. Called on the server's event loop.
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
            # allowances go on where nothing has changed
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
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino
