"""`bessemer launch`: a coding agent on the local server."""

from __future__ import annotations

from typing import Annotated

import typer


def launch(
    agent: Annotated[str, typer.Argument(help="claude, codex or opencode.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for it, after --.")] = None,
    url: Annotated[str, typer.Option(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of a model of the server (default: its first).")] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's key, where it asks for one.")
    ] = None,
) -> None:
    """Start a coding agent that uses the models of `bessemer serve`, or say what is missing."""
    import os

    from bessemer.agents.launch import launch_command, served_model, start_agent

    key = os.environ.get(key_variable, "") if key_variable else ""
    launch_command(agent, url, "", ())
    name = served_model(url, model, key_variable or "")
    command, environment = launch_command(agent, url, name, arguments or (), key or None)
    raise typer.Exit(start_agent(command, environment))
