"""Clients: in whose name a request comes, what it may do, and how much of it in a minute."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from fastapi import Request

from bessemer.assistant.principal import Principal
from bessemer.core.hashing import hash_bytes
from bessemer.serving.bodies import ApiError

#: Where the gate leaves the caller in a request's ASGI scope.
SCOPE = "bessemer.caller"


class Allowance:
    """At most `per_minute` units a minute: a bucket that holds a minute's worth, and refills evenly.

    Tokens are counted when they have been made, so a bucket may be overdrawn; then it is empty until it has recovered.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._filled_at = clock()

    @property
    def wait(self) -> float:
        """Seconds until a unit may be spent, 0 where one may be now."""
        self._refill()
        return max(0.0, (1 - self._left) * 60 / self.per_minute)

    def spend(self, units: int) -> None:
        """Take units, whether or not they are there."""
        self._refill()
        self._left -= units

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._filled_at) * self.per_minute / 60)
        self._filled_at = now


@dataclass(eq=False)
class Client:
    """The holder of a key, or everybody where none is asked for.

    id: what is theirs is stored under it. is_admin: whether they may change what is served. salt: of their part of the prefix
    cache; None: the part that is shared. requests, tokens: allowances a minute; None: no limit.
    """

    principal: Principal
    id: str = ""
    is_admin: bool = False
    salt: str | None = None
    requests: Allowance | None = None
    tokens: Allowance | None = None
    #: Set when the key is revoked; what is under way for it then ends.
    revoked: asyncio.Event = field(default_factory=asyncio.Event)

    def take_request(self) -> None:
        """Count a request. Raises ApiError (429) where an allowance is used up."""
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
    """The client of one request, and what the request has used. on_spend: called whenever that is more.

    headers: that its response carries. held: what is kept for it until its response has been sent, or its client has left;
    closed by what made the caller.
    """

    client: Client
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    on_spend: Callable[[], None] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)

    def spend(self, *, prompt: int = 0, completion: int = 0) -> None:
        """Count tokens, for the client's allowance too."""
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if self.client.tokens is not None:
            self.client.tokens.spend(prompt + completion)
        if self.on_spend is not None:
            self.on_spend()

    def salt(self, given: str | None) -> str | None:
        """The salt of the prefix cache for a request that names one of its own, or none: other clients never share it."""
        if self.client.salt is None or given is None:
            return self.client.salt or given
        return hash_bytes(self.client.salt.encode(), given.encode())


def caller_of(request: Request) -> Caller:
    """The caller of a request that has passed the gate."""
    caller = request.scope[SCOPE]
    assert isinstance(caller, Caller)
    return caller
