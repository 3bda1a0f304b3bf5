"""How a request travels from the entrance to a replica, and its answer back: ASGI's own messages, and what the request used.

`PrefixMemory` says which replica has which beginnings of prompts in its cache, as far as the entrance can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from bessemer.assistant.config import Principal
from bessemer.serving.runtime.bodies import ApiError, read_json
from bessemer.serving.runtime.clients import SCOPE, Caller, Client

#: Characters of a block: some 64 tokens.
_BLOCK = 256
#: Blocks that are remembered; those that were not seen for the longest time go first.
_MOST_BLOCKS = 100_000


class PrefixMemory:
    """The replicas that prompts were sent to, by their beginnings in whole blocks. What a replica has dropped since is not
    known here: a wrong guess costs a prefill and nothing else."""

    def __init__(self, block: int = _BLOCK, most: int = _MOST_BLOCKS) -> None:
        self._block = block
        self._most = most
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()

    def matches(self, prompt: str, replicas: Collection[str]) -> dict[str, float]:
        """The share of a prompt's blocks, from its beginning, that each replica has seen; those that have seen none are left
        out."""
        chains = list(self._chains(prompt))
        matched: dict[str, int] = {}
        staying = set(replicas)
        for place, chain in enumerate(chains, 1):
            staying &= self._replicas.get(chain, set())
            if not staying:
                break
            matched |= dict.fromkeys(staying, place)
        return {replica: blocks / len(chains) for replica, blocks in matched.items()}

    def remember(self, prompt: str, replica: str) -> None:
        """A prompt was sent to a replica."""
        for chain in self._chains(prompt):
            self._replicas.setdefault(chain, set()).add(replica)
            self._replicas.move_to_end(chain)
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        living = set(replicas)
        for chain in list(self._replicas):
            self._replicas[chain] &= living
            if not self._replicas[chain]:
                del self._replicas[chain]

    def _chains(self, prompt: str) -> Iterator[int]:
        """A hash of each beginning in whole blocks."""
        chain = 0
        for start in range(0, len(prompt) - self._block + 1, self._block):
            chain = hash((chain, prompt[start : start + self._block]))
            yield chain


_log = logging.getLogger(__name__)

#: What a route reads of a scope, and what can be sent to another process.
_SCOPE_KEYS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
#: Fields of the dialects that a prompt is made of, in the order in which they stand in it.
_PROMPT_FIELDS = ("model", "system", "instructions", "tools", "messages", "input", "prompt")
#: The routes whose bodies are prompts.
_PROMPT_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@dataclass(frozen=True)
class Forwarded:
    """A request that has passed the gate, with its whole body and in whose name it comes.

    prompt: a text that begins alike for requests whose prompts begin alike; "" for one that has none.
    """

    scope: Mapping[str, Any]
    body: bytes
    request_id: str
    principal: Principal
    client_id: str = ""
    is_admin: bool = False
    salt: str | None = None
    prompt: str = ""

    @classmethod
    def of(cls, scope: Scope, body: bytes, caller: Caller) -> Forwarded:
        """The request of a scope."""
        client = caller.client
        plain = {key: scope[key] for key in _SCOPE_KEYS if key in scope}
        prompt = prompt_of(body) if scope["method"] == "POST" and scope["path"] in _PROMPT_ROUTES else ""
        # requests of clients with different salts share no cache
        prompt = f"{client.salt}\n{prompt}" if prompt and client.salt else prompt
        return cls(plain, body, caller.id, client.principal, client.id, client.is_admin, client.salt, prompt)

    def caller(self) -> Caller:
        """The caller, as a route of the replica sees it."""
        client = Client(self.principal, id=self.client_id, is_admin=self.is_admin, salt=self.salt)
        return Caller(client, id=self.request_id)


class Part(NamedTuple):
    """Messages of an answer, and what the request has used since the part before."""

    messages: list[Message]
    model: str | None
    prompt_tokens: int
    completion_tokens: int


def prompt_of(body: bytes) -> str:
    """What a body's prompt is made of, as one text; "" where the body is none."""
    try:
        asked = read_json(body)
    except ApiError:
        return ""
    if not isinstance(asked, dict):
        return ""
    given = (asked.get(field) for field in _PROMPT_FIELDS)
    return "\n".join(one if isinstance(one, str) else json.dumps(one) for one in given if one)


#: Stands among the messages where the request has used more.
_SPENT: Message = {"type": "bessemer.spent"}


@dataclass(eq=False)
class _Exchange:
    """The application's side of one request."""

    asked: Forwarded
    caller: Caller
    told: asyncio.Queue[Message | None] = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    is_read: bool = False
    is_answered: bool = False

    async def receive(self) -> Message:
        if not self.is_read:
            self.is_read = True
            return {"type": "http.request", "body": self.asked.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.told.put(message)
        self.is_answered |= message["type"] == "http.response.body" and not message.get("more_body", False)


async def _ended(running: asyncio.Task[None], exchange: _Exchange) -> None:
    """The end of an application. Raises what it failed of where its answer is not whole; else the log has it."""
    try:
        await running
    except Exception:
        if not exchange.is_answered:
            raise
        _log.exception("the request %s failed", exchange.asked.request_id)


async def answer(app: ASGIApp, asked: Forwarded) -> AsyncGenerator[Part, None]:
    """An application's answer to a request, as it comes; all that is there at once is one part. Closing or cancelling it tells
    the application that its client has left, and ends it."""
    exchange = _Exchange(asked, asked.caller())
    # what a prompt costs is told at once: its client may leave before the answer is there
    exchange.caller.on_spend = lambda: exchange.told.put_nowait(_SPENT)
    scope = {**asked.scope, "root_path": "", SCOPE: exchange.caller}

    async def run() -> None:
        try:
            await app(scope, exchange.receive, exchange.send)
        finally:
            exchange.caller.held.close()
            await exchange.told.put(None)

    running = asyncio.create_task(run())
    prompt_tokens = completion_tokens = 0
    try:
        is_over = False
        while not is_over:
            news = [await exchange.told.get()]
            while not exchange.told.empty():
                news.append(exchange.told.get_nowait())
            is_over = None in news
            caller = exchange.caller
            yield Part(
                [message for message in news if message is not None and message is not _SPENT],
                caller.model,
                caller.prompt_tokens - prompt_tokens,
                caller.completion_tokens - completion_tokens,
            )
            prompt_tokens, completion_tokens = caller.prompt_tokens, caller.completion_tokens
        await _ended(running, exchange)
    finally:
        exchange.left.set()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await running
