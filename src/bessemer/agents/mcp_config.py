"""MCP servers' configuration, as other programs write it, and the definitions of their tools that were approved."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bessemer.agents.config import McpServerConfig
from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.store import read_json, write_json

#: Between a server's name and its tool's, in the name under which the tool is offered.
SEPARATOR = "__"
#: What servers and tools may be called.
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def read_mcp_config(path: Path) -> dict[str, McpServerConfig]:
    """The servers of a file in the usual form, `{"mcpServers": {NAME: {"command": …, "args": […]} | {"url": …}}}`, by name.

    `${NAME}` and `${NAME:-default}` stand for environment variables. Keys of other programs are passed over; one that looks
    like a misspelt key of ours is not. Raises ConfigError, in one line, for a file that cannot be read and for what is wrong in
    it.
    """
    try:
        given = read_json(path, "MCP configuration")
    except ArtefactError as error:
        raise ConfigError(str(error)) from None
    servers = given.get("mcpServers") if isinstance(given, dict) else None
    if not isinstance(servers, dict):
        raise ConfigError(f'{path}: it holds no object "mcpServers" with a server under each name')
    return {name: server for name, values in servers.items() if not (server := _server(path, str(name), values)).disabled}


def _server(path: Path, name: str, values: Any) -> McpServerConfig:
    where = f"{path}: mcpServers.{name}"
    if not NAME.fullmatch(name) or SEPARATOR in name:
        raise ConfigError(f"{where}: a name is letters, digits, '_', '-' and '.', at most 64, without {SEPARATOR!r}")
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a server is an object with a command or a url")
    known = list(McpServerConfig.model_fields)
    for key in values.keys() - set(known):
        if "did you mean" in (hint := nearest(str(key), known)):
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    server = McpServerConfig.parse(_expanded({key: values[key] for key in known if key in values}, where), where)
    if (server.command is None) == (server.url is None):
        raise ConfigError(f"{where}: give a command or a url, one of them")
    if server.url is not None and not server.url.startswith(("http://", "https://")):
        raise ConfigError(f"{where}: url: {server.url!r} does not begin with http:// or https://")
    return server


def _expanded(value: Any, where: str) -> Any:
    """A value with environment variables in its strings."""
    if isinstance(value, dict):
        return {key: _expanded(inner, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, where) for inner in value]
    if not isinstance(value, str):
        return value

    def of_environment(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(f"{where}: the environment variable {match[1]} is not set")
        return found

    return _VARIABLE.sub(of_environment, value)


@dataclass(frozen=True)
class Definition:
    """A tool as its server describes it. is_read_only, is_idempotent: what the server says of itself, which is no proof."""

    name: str
    description: str
    schema: Mapping[str, Any]
    is_read_only: bool = False
    is_idempotent: bool = False

    @property
    def hash(self) -> str:
        """Of everything that a model or a person is shown."""
        return hash_value([self.name, self.description, self.schema, self.is_read_only, self.is_idempotent])


class ApprovedTools:
    """Hashes of the definitions that were approved, by server and tool, in a file beside the configuration."""

    def __init__(self, path: Path | None) -> None:
        """path: None keeps them for this process alone. Raises ArtefactError for a damaged file."""
        self._path = path
        self._lock = threading.Lock()
        self._hashes: dict[str, dict[str, str]] = {}
        if path is not None and path.exists():
            given = read_json(path, "approved tools")
            if not isinstance(given, dict) or not all(isinstance(tools, dict) for tools in given.values()):
                raise ArtefactError(f"{path}: it does not hold approved tools; remove it, and look at the tools again")
            self._hashes = given

    @classmethod
    def beside(cls, config: Path) -> Self:
        """Those of a configuration file."""
        return cls(config.with_name(f"{config.name}.approved.json"))

    def refused(self, server: str, definitions: Sequence[Definition], *, approve: bool = False) -> dict[str, str]:
        """Why each tool that may not be offered may not: it is new, or has changed, since its server was approved.

        A server that was never seen is approved as it is: its user has just put it into the configuration. approve: approve
        all.
        """
        with self._lock:
            known = self._hashes.get(server)
            if known is None or approve:
                self._hashes[server] = {one.name: one.hash for one in definitions}
                if self._path is not None and self._hashes[server] != known:
                    write_json(self._path, self._hashes)
                return {}
            return {
                one.name: "has changed" if one.name in known else "is new"
                for one in definitions
                if known.get(one.name) != one.hash
            }
