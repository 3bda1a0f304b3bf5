"""`bessemer mcp`: Bessemer's abilities as an MCP server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Device, Runs


def mcp(
    model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL: a model that clients may use, opened when they do; may be repeated."),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: an index of documents, as `bessemer index` makes it; may be repeated."),
    ] = None,
    http: Annotated[bool, typer.Option("--http", help="Listen on a port instead of standard input and output.")] = False,
    host: Annotated[str, typer.Option(help="--http: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="--http: port to listen on.", min=0, max=65535)] = 8010,
    api_key: Annotated[str | None, typer.Option(help="--http: ask clients for this key.", envvar="BESSEMER_API_KEY")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Let other agents search and ask indexes, use, inspect and evaluate models, plan runs, and explain documents, by MCP."""
    from bessemer.agents.mcp_server import http_app, make_server, serve_http, serve_stdio
    from bessemer.cli.named import find_served, named_folders, named_models
    from bessemer.core.errors import ArtefactError
    from bessemer.pipeline.abilities import INSTRUCTIONS, Abilities

    models = {name: find_served(place, runs) for name, place in named_models(model, ()).items()}
    indexes = {name: Path(place) for name, place in named_folders(index).items()}
    if missing := next((place for place in indexes.values() if not place.is_dir()), None):
        raise ArtefactError(f"--index {missing}: there is no such folder")
    with Abilities(models, indexes, device) as abilities:
        server = make_server(abilities.tools(), instructions=INSTRUCTIONS)
        if http:
            serve_http(http_app(server, host, api_key), host, port)
        else:
            serve_stdio(server)
