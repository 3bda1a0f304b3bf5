"""`bessemer tinker`: a server of the Tinker API, for training loops that clients write."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Device, Model, Runs

_access = partial(typer.Option, rich_help_panel="Who may use it")
_training = partial(typer.Option, rich_help_panel="Training")
_sampling = partial(typer.Option, rich_help_panel="Sampling")


def tinker(
    context: typer.Context,
    model: Model,
    states: Annotated[
        Path, typer.Option(help="Folder of the clients' saved weights, from which a restarted server continues.")
    ] = Path("tinker"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name under which clients ask for the model.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name of the model; may be repeated.")] = None,
    api_key: Annotated[str | None, _access(help="Ask clients for this key.", envvar="BESSEMER_API_KEY")] = None,
    keys: Annotated[Path | None, _access(help="File of API keys, by `bessemer keys`; asks for one of them.")] = None,
    allow_host: Annotated[
        list[str] | None, _access(help="A name that clients may call the server by; * is any; may be repeated.")
    ] = None,
    max_body: Annotated[float | None, _access(help="MiB of a request above which it is refused; 8.")] = None,
    request_log: Annotated[
        bool, _access("--request-log", help="A line of JSON for every request, without what it says.")
    ] = False,
    dtype: Annotated[str, _training(help="Of matmuls and of the frozen weights: float32 or bfloat16.")] = "float32",
    micro_batch_tokens: Annotated[
        int | None, _training(help="Tokens that are computed at once, padding included; 2,048.")
    ] = None,
    recompute: Annotated[
        bool, _training("--recompute", help="Compute the blocks again in the backward pass: less memory, more time.")
    ] = False,
    max_runs: Annotated[int | None, _training(help="Training runs in memory at once; 8.")] = None,
    idle_minutes: Annotated[float | None, _training(help="After which a silent client's runs leave the memory; 30.")] = None,
    snapshots: Annotated[int | None, _sampling(help="Unnamed weights for sampling that a run keeps; 8.")] = None,
    max_adapters: Annotated[int | None, _sampling(help="Saved weights that are sampled from at once; 16.")] = None,
    kv_memory: Annotated[float | None, _sampling(help="GiB for the KV cache; a quarter of what is free.")] = None,
    max_model_len: Annotated[
        int | None, _sampling(help="At most this many tokens of prompt and sample together; the model's context.")
    ] = None,
    max_num_seqs: Annotated[int | None, _sampling(help="Sequences computed at once.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Serve a model's training and sampling behind the Tinker API: the loops of tinker-cookbook run on this machine."""
    from bessemer.cli.named import find_model, given_options, option_of
    from bessemer.core.errors import ArtefactError
    from bessemer.core.store import locked_folder
    from bessemer.inference.config import EngineConfig
    from bessemer.serving.config import ServingConfig
    from bessemer.serving.tinker.config import TinkerLimits, TrainingSettings

    folder = find_model(model, runs)
    if folder.is_file():
        raise ArtefactError(f"{folder}: training needs a model's folder; make one by bessemer import {folder} FOLDER")
    given = given_options(context, "host", "port", "api_key", "keys", "max_body", "request_log")
    config = ServingConfig.parse(given | {"hosts": [each.lower() for each in allow_host or ()]}, option_of("tinker"))
    engine = EngineConfig.parse(given_options(context, "kv_memory", "max_model_len", "max_num_seqs"), option_of("tinker"))
    limits = TinkerLimits.parse(
        given_options(context, "max_runs", "max_adapters", "snapshots", "idle_minutes"), option_of("tinker")
    )
    settings = TrainingSettings.parse(
        given_options(context, "device", "dtype", "micro_batch_tokens", "recompute"), option_of("tinker")
    )
    from bessemer.serving.tinker.app import serve_tinker
    from bessemer.serving.tinker.service import TinkerService
    from bessemer.serving.tinker.states import StateStore
    from bessemer.serving.tinker.training import BaseModel

    # two servers would delete and replace each other's weights
    with locked_folder(states):
        base = BaseModel(folder, settings)
        service = TinkerService(
            base, name or Path(model).name, StateStore(states), aliases=tuple(alias or ()), limits=limits, engine=engine
        )
        print(service.engine.describe())
        print(service.engine.arithmetic)
        print(f"weights are saved below {states}; {len(list(states.glob('*/run.json'))):,} earlier runs")
        serve_tinker(service, config)
