"""Tools as an MCP server, over standard input and output or HTTP, by the official SDK.

The server answers clients of the specification of 2026-07-28 and of those before it. It holds no state between requests. A call
runs in a thread, one at a time: tools share an engine, and the clients of this server are programs of one user.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from bessemer.assistant.tools import Tool
from bessemer.core.environment import install_advice
from bessemer.core.errors import ConfigError

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

#: Path of the endpoint on an HTTP server.
MCP_PATH = "/mcp"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def make_server(tools: Sequence[Tool], *, name: str = "bessemer", instructions: str = "") -> Server[Any]:
    """An MCP server of tools, which change nothing: clients are told so. instructions: what they are for, shown to a client's
    model. Raises ConfigError without the package `mcp`."""
    try:
        import mcp_types as types
        from mcp.server.lowlevel import Server
    except ImportError:
        raise ConfigError(install_advice("mcp")) from None
    by_name = {tool.name: tool for tool in tools}
    one_at_a_time = asyncio.Lock()
    listed = [
        types.Tool(
            name=tool.name,
            description=tool.description,
            input_schema=dict(tool.parameters),
            annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
        )
        for tool in tools
    ]

    async def list_tools(context: Any, parameters: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=listed)

    async def call_tool(context: Any, parameters: Any) -> types.CallToolResult:
        tool = by_name.get(parameters.name)
        if tool is None:
            text, is_error = f"error: there is no tool {parameters.name!r}; there are {', '.join(by_name)}", True
        else:
            async with one_at_a_time:
                result = await asyncio.to_thread(tool.call, parameters.arguments or {})
            text, is_error = result.text, result.is_error
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=is_error)

    return Server(
        name,
        version=package_version("bessemer"),
        instructions=instructions or None,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def serve_stdio(server: Server[Any]) -> None:
    """Serve one client over standard input and output, until it closes them. Whatever tools print goes to standard error."""
    from mcp.server.stdio import stdio_server

    async def serve() -> None:
        async with stdio_server() as (read_stream, write_stream):
            # standard output is the protocol's
            with contextlib.redirect_stdout(sys.stderr):
                await server.run(read_stream, write_stream, server.create_initialization_options())

    asyncio.run(serve())


def http_app(server: Server[Any], host: str = "127.0.0.1", api_key: str | None = None) -> _App:
    """The server as an ASGI application with its endpoint at `/mcp`.

    On a loopback address, the SDK refuses requests whose `Host` or `Origin` is of another machine. api_key: asked of every
    client, as `Authorization: Bearer KEY`. Raises ConfigError for another address without a key.
    """
    if host not in _LOOPBACK and api_key is None:
        raise ConfigError(f"--host {host}: other machines can reach it; give --api-key too, or listen on 127.0.0.1")
    logging.getLogger("mcp").setLevel(logging.WARNING)
    app = server.streamable_http_app(streamable_http_path=MCP_PATH, json_response=True, stateless_http=True, host=host)
    return app if api_key is None else _with_key(app, api_key)


def _with_key(app: _App, api_key: str) -> _App:
    expected = f"Bearer {api_key}".encode()

    async def guarded(scope: _Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        given = dict(scope.get("headers") or ()).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(given, expected):
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "the key is missing or wrong"}'})
            return
        await app(scope, receive, send)

    return guarded


def serve_http(app: _App, host: str, port: int) -> None:
    """Serve any number of clients until Ctrl-C or SIGTERM; prints the endpoint's address once it can be reached. Raises
    ConfigError for a port that is taken."""
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {(error.strerror or str(error)).lower()}") from None
        listener.listen(128)
        place = f"[{host}]" if ":" in host else host
        print(f"MCP server on http://{place}:{listener.getsockname()[1]}{MCP_PATH}", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])
