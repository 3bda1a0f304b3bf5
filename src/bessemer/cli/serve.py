"""`bessemer serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="A model's folder or a run's name.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name under which clients ask for the model.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Ask clients for this key.", envvar="BESSEMER_API_KEY")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Serve a model behind the OpenAI API, with a chat page."""
    from bessemer.cli.named import example_questions, find_model
    from bessemer.inference.engine import Engine
    from bessemer.serving.config import ServingConfig
    from bessemer.serving.server import serve as serve_engine

    folder = find_model(model, runs)
    config = ServingConfig.parse(
        {"host": host, "port": port, "api_key": api_key, "suggestions": example_questions(folder)}, "serve"
    )
    serve_engine(Engine(folder, device=device), name or Path(model).name, config)
