"""Settings of agents: what a task may use, and an MCP server."""

from __future__ import annotations

from bessemer.core.config import Config, setting


class Budget(Config):
    """What a task may use. A task that is resumed goes on counting."""

    steps: int = setting(20, "messages of the assistant; the calls of the last one are not made", ge=1)
    tokens: int = setting(200_000, "tokens of all prompts and completions together", unit="tokens", ge=1)
    seconds: float = setting(900.0, "seconds in messages and calls; a person's thinking does not count", unit="seconds", gt=0)


class McpServerConfig(Config):
    """A server of a file of MCP servers: a command, or a URL."""

    command: str | None = setting(None, "program of a server that talks over standard input and output")
    args: list[str] = setting(default_factory=list, description="arguments of the program")
    env: dict[str, str] = setting(default_factory=dict, description="environment variables beside PATH, HOME and the like")
    cwd: str | None = setting(None, "folder in which the program runs")
    url: str | None = setting(None, "address of a server that talks over HTTP")
    headers: dict[str, str] = setting(default_factory=dict, description="headers of every request, such as Authorization")
    timeout: float = setting(60.0, "longest time of one call", unit="seconds", gt=0)
    disabled: bool = setting(False, "leave the server out")
