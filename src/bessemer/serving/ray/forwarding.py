"""Requests forwarded from the entrance to a replica, and responses back: ASGI messages with the tokens that were used.

`PrefixMemory` guesses which replica has a prompt's beginning in its prefix cache.
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

from bessemer.assistant.conversation import Principal
from bessemer.serving.runtime.bodies import ApiError, read_json
from bessemer.serving.runtime.clients import SCOPE, Caller, Client

#: Characters of a block, about 64 tokens.
_BLOCK = 256
#: Most remembered blocks; the least recently used are dropped.
_MOST_BLOCKS = 100_000


class PrefixMemory:
    """The replicas that prompts were sent to, by the prompts' leading blocks. A replica may have dropped a block since: a wrong
    guess costs one prefill."""

    def __init__(self, block: int = _BLOCK, most: int = _MOST_BLOCKS) -> None:
        self._block = block
        self._most = most
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()

    def matches(self, prompt: str, replicas: Collection[str]) -> dict[str, float]:
        """The share of a prompt's leading blocks that each replica has seen, in 0 … 1; replicas without any are left out."""
        chains = list(self._chains(prompt))
        matched: dict[str, int] = {}
        matching = set(replicas)
        for blocks, chain in enumerate(chains, 1):
            matching &= self._replicas.get(chain, set())
            if not matching:
                break
            matched |= dict.fromkeys(matching, blocks)
        return {replica: blocks / len(chains) for replica, blocks in matched.items()}

    def remember(self, prompt: str, replica: str) -> None:
        """Note that a prompt was sent to a replica."""
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
        """A hash for each leading block, which covers the blocks before it."""
        chain = 0
        for start in range(0, len(prompt) - self._block + 1, self._block):
            chain = hash((chain, prompt[start : start + self._block]))
            yield chain


_log = logging.getLogger(__name__)

#: Keys of an ASGI scope that routes read and that can be pickled.
_SCOPE_KEYS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
#: Fields of all APIs that make up a prompt, in their order within it.
_PROMPT_FIELDS = ("model", "system", "instructions", "tools", "messages", "input", "prompt")
#: The routes whose bodies are prompts.
_PROMPT_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate")


@dataclass(frozen=True)
class Forwarded:
    """A request that has passed the gate, with its body and its client's identity.

    prompt: stands for the prompt in `PrefixMemory`: equal beginnings for prompts with equal beginnings; "" for none.
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
        client = caller.client
        plain = {key: scope[key] for key in _SCOPE_KEYS if key in scope}
        prompt = prompt_of(body) if scope["method"] == "POST" and scope["path"] in _PROMPT_ROUTES else ""
        # clients with different salts share no cache
        prompt = f"{client.salt}\n{prompt}" if prompt and client.salt else prompt
        return cls(plain, body, caller.id, client.principal, client.id, client.is_admin, client.salt, prompt)

    def caller(self) -> Caller:
        """The caller for the routes of the replica."""
        client = Client(self.principal, id=self.client_id, is_admin=self.is_admin, salt=self.salt)
        return Caller(client, id=self.request_id)


class ResponsePart(NamedTuple):
    """ASGI messages of a response, and the tokens used since the part before."""

    messages: list[Message]
    model: str | None
    prompt_tokens: int
    completion_tokens: int


def prompt_of(body: bytes) -> str:
    """The fields that make up a body's prompt, as one text; "" for an invalid body."""
    try:
        values = read_json(body)
    except ApiError:
        return ""
    if not isinstance(values, dict):
        return ""
    parts = (values.get(field) for field in _PROMPT_FIELDS)
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part)


#: Queued among the messages when the request has used more tokens.
_SPENT: Message = {"type": "bessemer.spent"}


@dataclass(eq=False)
class _Exchange:
    """The receive and send channels of one request to the application. None in `sent` is the end."""

    request: Forwarded
    caller: Caller
    sent: asyncio.Queue[Message | None] = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    is_read: bool = False
    is_answered: bool = False

    async def receive(self) -> Message:
        if not self.is_read:
            self.is_read = True
            return {"type": "http.request", "body": self.request.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.sent.put(message)
        self.is_answered |= message["type"] == "http.response.body" and not message.get("more_body", False)


async def _ended(running: asyncio.Task[None], exchange: _Exchange) -> None:
    """Await the application's end. Raises its error while the response is incomplete; a later one goes to the log."""
    try:
        await running
    except Exception:
        if not exchange.is_answered:
            raise
        _log.exception("the request %s failed", exchange.request.request_id)


async def answer(app: ASGIApp, request: Forwarded) -> AsyncGenerator[ResponsePart, None]:
    """An application's response to a request, as it comes; messages that are there at once are one part. Closing or cancelling
    it ends the application as if its client had left."""
    exchange = _Exchange(request, request.caller())
    # the tokens of a prompt are reported at once: the client may leave before the response begins
    exchange.caller.on_spend = lambda: exchange.sent.put_nowait(_SPENT)
    scope = {**request.scope, "root_path": "", SCOPE: exchange.caller}

    async def run() -> None:
        try:
            await app(scope, exchange.receive, exchange.send)
        finally:
            exchange.caller.held.close()
            await exchange.sent.put(None)

    running = asyncio.create_task(run())
    prompt_tokens = completion_tokens = 0
    try:
        is_over = False
        while not is_over:
            messages = [await exchange.sent.get()]
            while not exchange.sent.empty():
                messages.append(exchange.sent.get_nowait())
            is_over = None in messages
            caller = exchange.caller
            yield ResponsePart(
                [message for message in messages if message is not None and message is not _SPENT],
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
