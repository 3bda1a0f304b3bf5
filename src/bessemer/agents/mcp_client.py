"""MCP servers as sources of tools, over standard input and output or HTTP, by the official SDK.

The SDK (`mcp`, 2.3 or newer) speaks the specification of 2026-07-28 and the ones before it, and follows no redirect to another
origin. What is ours is around it: the configuration as other programs write it, approval of definitions, time limits, names,
one line for whatever goes wrong. A result is a tool's: its part of the conversation has the origin `tool`, so the conversation
is tainted (`assistant/messages.py`).

A server is trusted to run, since its command stands in the user's own configuration. Nothing that it says is: a definition
is hashed when it is first seen, and a tool that is new or has another hash later is not offered, and not called, until it is
approved again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from bessemer.agents.config import McpServerConfig
from bessemer.agents.mcp_config import NAME, SEPARATOR, ApprovedTools, Definition, read_mcp_config
from bessemer.assistant.tools import Tool, ToolResult
from bessemer.core.environment import install_advice
from bessemer.core.errors import BessemerError, ConfigError

if TYPE_CHECKING:
    from mcp import Client

Value = TypeVar("Value")

#: Seconds for a server to start and say what it can: npx and uvx download programs at the first start.
CONNECT_SECONDS = 60.0
#: Characters of a description that are shown to a model, and of a schema as JSON; a tool with a longer one is left out.
_LONGEST_DESCRIPTION, _LONGEST_SCHEMA = 2_000, 20_000
#: Tools of one server, and pages of their list, that are read.
_MOST_TOOLS, _MOST_PAGES = 500, 50
#: Seconds after which a list is read again: servers of 2026-07-28 tell only those that subscribe that it has changed.
_LIST_SECONDS = 60.0
#: Times that a server which ended is started again.
_MOST_RESTARTS = 2

#: Prints a line about a server.
Report = Callable[[str], None]


class McpServers:
    """Several servers and their tools; a context manager, whose end ends the servers.

    A thread of its own speaks to them. A server that cannot be started, or ends, is one line to `report`, and the others go on.
    """

    def __init__(
        self,
        configs: Mapping[str, McpServerConfig],
        approved: ApprovedTools,
        report: Report,
        *,
        approve: bool = False,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        """approve: approve tools that are new or have changed. Raises ConfigError without the package `mcp`."""
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise ConfigError(install_advice("mcp")) from None
        # every failure is in our one line; the SDK logs it with its traceback as well
        logging.getLogger("mcp").setLevel(logging.CRITICAL)
        self._report = report
        self._approved = approved
        self._connections = [_Connection(name, config, connect_seconds) for name, config in configs.items()]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        for connection in self._connections:
            connection.begin(self._loop)
        for connection in self._connections:
            self._connected(connection, approve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers."""
        if not self._thread.is_alive():
            return
        for connection in self._connections:
            connection.end()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def tools(self) -> list[Tool]:
        """The approved tools of all servers that are there. A list that a server says has changed, or that is a minute old, is
        read again."""
        tools = []
        for connection in self._connections:
            if connection.is_gone:
                continue
            if connection.failure is None and connection.is_stale:
                self._read_tools(connection, approve=False)
            tools += [tool for name, tool in connection.tools.items() if name not in connection.refused]
        return tools

    def is_repeatable(self, name: str) -> bool:
        """Whether a tool's server says that calling it twice is the same as once."""
        server, _, tool = name.partition(SEPARATOR)
        return any(
            one.is_read_only or one.is_idempotent
            for connection in self._connections
            if connection.name == server
            for one in connection.definitions
            if one.name == tool
        )

    def _connected(self, connection: _Connection, approve: bool) -> None:
        try:
            connection.wait()
        except BessemerError as error:
            self._report(str(error))
        else:
            self._read_tools(connection, approve)

    def _read_tools(self, connection: _Connection, approve: bool) -> None:
        try:
            definitions = connection.list_tools()
        except BessemerError as error:
            self._report(str(error))
            return
        refused = self._approved.refused(connection.name, definitions, approve=approve)
        for name, reason in refused.items():
            if connection.refused.get(name) != reason:
                self._report(
                    f"MCP server {connection.name}: the tool {shown(name)} {reason} since it was approved, and is left out; "
                    "--approve-tools accepts it"
                )
        connection.refused = refused
        connection.tools = {}
        for one in definitions:
            try:
                connection.tools[one.name] = self._tool(connection, one)
            except ConfigError as error:
                self._report(f"MCP server {connection.name}: {shown(one.name)} is left out: {error}")

    def _tool(self, connection: _Connection, definition: Definition) -> Tool:
        """Raises ConfigError for a definition that cannot be offered."""
        if not NAME.fullmatch(definition.name):
            raise ConfigError("its name is not letters, digits, '_', '-' and '.', at most 64")
        if len(json.dumps(definition.schema)) > _LONGEST_SCHEMA:
            raise ConfigError(f"its schema is longer than {_LONGEST_SCHEMA:,} characters")
        return Tool(
            f"{connection.name}{SEPARATOR}{definition.name}",
            definition.description[:_LONGEST_DESCRIPTION],
            definition.schema,
            lambda **arguments: self._call(connection, definition, arguments),
            # the connection's own limit ends a call first, and ends it at the server too
            time_limit=connection.config.timeout + 5.0,
        )

    def _call(self, connection: _Connection, definition: Definition, arguments: Mapping[str, Any]) -> ToolResult:
        """Raises what `_Connection` raises, which becomes a failed result."""
        if connection.failure is not None:
            connection.restart(self._loop)
            connection.listed = -math.inf
        if connection.is_stale:
            self._read_tools(connection, approve=False)
        if connection.failure is not None:
            raise McpError(connection.failure)
        if reason := connection.refused.get(definition.name):
            raise RefusedToolError(f"the tool {reason} since it was approved, and is not called")
        if definition.name not in connection.tools:
            raise RefusedToolError("the server no longer has this tool")
        try:
            return connection.call(definition.name, arguments)
        except McpError as error:
            if connection.failure is not None:
                self._report(str(error))
            raise


def open_mcp_servers(path: Path, report: Report, *, approve: bool = False) -> McpServers:
    """The servers of a configuration file, with the approvals beside it. Raises as `read_mcp_config` and `McpServers`."""
    return McpServers(read_mcp_config(path), ApprovedTools.beside(path), report, approve=approve)


class McpError(BessemerError):
    """An MCP server that cannot be reached, has ended, or answered something else than the protocol says."""


class RefusedToolError(BessemerError):
    """A tool whose definition is not the one that was approved."""


@dataclass
class _Connection:
    """One server. Its task holds the SDK's client; other threads hand it coroutines."""

    name: str
    config: McpServerConfig
    connect_seconds: float
    tools: dict[str, Tool] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    definitions: Sequence[Definition] = ()
    #: When its tools were listed last, by the monotonic clock; minus infinity once the server has said that they are others
    #: now.
    listed: float = -math.inf
    #: Why it cannot be called.
    failure: str | None = None
    _restarts: int = 0
    _client: Client | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _ready: Future[None] = field(default_factory=Future)
    _held: Future[None] | None = None
    _stop: asyncio.Event | None = None
    _errors: IO[str] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether its list of tools has to be read again."""
        return time.monotonic() - self.listed > _LIST_SECONDS

    @property
    def is_gone(self) -> bool:
        """Whether it cannot be called any more."""
        return self.failure is not None and self._restarts >= _MOST_RESTARTS

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the server, or reach it; `wait` says what came of it."""
        self._loop, self.failure, self._ready = loop, None, Future()
        self._held = asyncio.run_coroutine_threadsafe(self._hold(self._ready), loop)

    def restart(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a server again that has ended. Raises McpError where it cannot be, or has ended too often."""
        if self._restarts >= _MOST_RESTARTS:
            raise McpError(self.failure or f"MCP server {self.name}: it has ended")
        self._restarts += 1
        self.end()
        self.begin(loop)
        self.wait()

    def wait(self) -> None:
        """Until the server is there. Raises McpError."""
        try:
            self._ready.result(self.connect_seconds)
        except FutureTimeoutError:
            self.end()
            self._fail(f"does not answer within {self.connect_seconds:g} s")
        except Exception as error:
            self._fail(f"cannot be {'started' if self.config.command else 'reached'}: {self._reason(error)}")

    def end(self) -> None:
        """End the server, and wait for it a little."""
        if self._held is None or self._loop is None:
            return
        if self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        else:
            self._held.cancel()
        try:
            self._held.result(10.0)
        except (Exception, asyncio.CancelledError, FutureTimeoutError):
            pass
        self._held = self._client = self._stop = None

    def list_tools(self) -> Sequence[Definition]:
        """Raises McpError."""
        # before it is asked: what changes meanwhile is heard of
        self.listed = time.monotonic()
        self.definitions = self._ask(self._list_tools, self.connect_seconds, "its tools cannot be listed")
        return self.definitions

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """The result of a call. Raises McpError where there is none."""
        seconds = self.config.timeout

        async def call(client: Client) -> Any:
            return await client.call_tool(name, dict(arguments), read_timeout_seconds=seconds)

        result = self._ask(call, seconds + 1.0, f"the call of {name} failed")
        return ToolResult(text_of(result), bool(result.is_error))

    def _ask(self, request: Callable[[Client], Awaitable[Value]], seconds: float, what: str) -> Value:
        client, loop = self._client, self._loop
        if client is None or loop is None:
            raise McpError(self.failure or f"MCP server {self.name}: it has ended")

        async def ask() -> Value:
            return await request(client)

        future = asyncio.run_coroutine_threadsafe(ask(), loop)
        try:
            return future.result(seconds)
        except FutureTimeoutError:
            future.cancel()
            raise McpError(f"MCP server {self.name}: {what}: it took longer than {seconds:g} s") from None
        except Exception as error:
            if self._has_ended(error):
                self._fail("has ended" + self._last_words())
            raise McpError(f"MCP server {self.name}: {what}: {self._reason(error)}") from None

    def _fail(self, reason: str) -> NoReturn:
        self._client = None
        self.failure = f"MCP server {self.name}: {reason}"
        raise McpError(self.failure) from None

    async def _hold(self, ready: Future[None]) -> None:
        """Hold the client open: the SDK wants it entered and left in one task."""
        from mcp import Client

        try:
            async with AsyncExitStack() as stack:
                transport = await self._transport(stack)
                client = Client(transport, message_handler=self._take_message, client_info=_client_info())
                self._client = await stack.enter_async_context(client)
                self._stop = asyncio.Event()
                ready.set_result(None)
                await self._stop.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error if isinstance(error, Exception) else McpError("it was ended"))
            if isinstance(error, asyncio.CancelledError):
                raise

    async def _transport(self, stack: AsyncExitStack) -> Any:
        if self.config.url is not None:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            # without a limit here the SDK's call has one
            limits = httpx2.Timeout(self.connect_seconds, read=None)
            client = await stack.enter_async_context(httpx2.AsyncClient(headers=self.config.headers, timeout=limits))
            return streamable_http_client(self.config.url, http_client=client)
        from mcp.client.stdio import StdioServerParameters, stdio_client

        assert self.config.command is not None
        # read after the client has ended, so it is not closed with that
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        parameters = StdioServerParameters(
            command=self.config.command,
            args=self.config.args,
            env=self.config.env,
            cwd=self.config.cwd,
            encoding_error_handler="replace",
        )
        return stdio_client(parameters, errlog=self._errors)

    async def _take_message(self, message: Any) -> None:
        if getattr(message, "method", "") == "notifications/tools/list_changed":
            self.listed = -math.inf

    async def _list_tools(self, client: Client) -> Sequence[Definition]:
        definitions: list[Definition] = []
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor, cache_mode="bypass")
            for tool in page.tools:
                hints = tool.annotations
                definitions.append(
                    Definition(
                        tool.name,
                        tool.description or "",
                        tool.input_schema,
                        bool(hints and hints.read_only_hint),
                        bool(hints and hints.idempotent_hint),
                    )
                )
            cursor = page.next_cursor
            if not cursor or len(definitions) >= _MOST_TOOLS:
                break
        return definitions[:_MOST_TOOLS]

    def _has_ended(self, error: Exception) -> bool:
        from mcp_types import CONNECTION_CLOSED

        code = getattr(getattr(error, "error", None), "code", None)
        return code == CONNECTION_CLOSED or type(error).__name__ in ("ClosedResourceError", "BrokenResourceError")

    def _last_words(self) -> str:
        """The last line that the program wrote to standard error."""
        try:
            if self._errors is None:
                return ""
            self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, self._errors.tell() - 4_000))
            lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        except (OSError, ValueError):
            return ""
        return f" (it said: {shown(lines[-1])})" if lines else ""

    def _reason(self, error: BaseException) -> str:
        while isinstance(error, BaseExceptionGroup) and error.exceptions:
            error = error.exceptions[0]
        if isinstance(error, FileNotFoundError):
            return f"there is no program {self.config.command!r}"
        return shown(str(error) or type(error).__name__) + self._last_words()


def _client_info() -> Any:
    from mcp_types import Implementation

    return Implementation(name="bessemer", version=package_version("bessemer"))


def shown(text: str) -> str:
    """Somebody else's text in a message of ours: on one line, without control characters, not longer than a line or two."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def text_of(result: Any) -> str:
    """The content of a call's result as text: texts as they are, for anything else what it is."""
    parts = []
    for block in result.content:
        match block.type:
            case "text":
                parts.append(block.text)
            case "image" | "audio":
                parts.append(f"[{block.type}, {shown(block.mime_type)}, {len(block.data) * 3 // 4:,} bytes]")
            case "resource_link":
                parts.append(f"[{shown(block.name)}: {shown(str(block.uri))}]")
            case "resource":
                text = getattr(block.resource, "text", None)
                parts.append(text if text is not None else f"[{shown(str(block.resource.uri))}, not text]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)
