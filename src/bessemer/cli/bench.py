"""`bessemer bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bessemer.serving.bench import LoadConfig, LoadResult

_EXAMPLE = "Example: bessemer bench serve http://127.0.0.1:8000 --concurrency 8"
bench = typer.Typer(no_args_is_help=True, help="Measure a server.", epilog=_EXAMPLE)


@bench.callback()
def _bench() -> None:
    """Measure a server."""


@bench.command(epilog=_EXAMPLE)
def serve(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server, such as http://127.0.0.1:8000.")],
    concurrency: Annotated[
        int | None, typer.Option(help="Number of clients, each of which sends its next request after an answer.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, sent without waiting for answers.")] = None,
    burstiness: Annotated[float | None, typer.Option(help="Distribution of arrivals: 1 is Poisson, less is in bursts.")] = None,
    requests: Annotated[int | None, typer.Option(help="Number of measured requests (default 100).")] = None,
    warmup: Annotated[int | None, typer.Option(help="Requests before those (default 2).")] = None,
    input_tokens: Annotated[int | None, typer.Option(help="Words of a prompt, about as many tokens (default 256).")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer (default 128).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines of {prompt} or {messages} to send instead.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions.")] = False,
    model: Annotated[str | None, typer.Option(help="Name of the model (default: the first that the server lists).")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of exactly that length.")] = True,
    temperature: Annotated[float | None, typer.Option(help="Temperature of sampling (default 0).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus (top-p) of sampling.")] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object of further fields for every request.")] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="ttft|tpot|e2el:MS: limit that an answer must meet to count as good; may be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of prompts and arrivals.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key.", envvar="BESSEMER_API_KEY")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the result as JSON, with the keys of vllm bench serve.")] = None,
    label: Annotated[str | None, typer.Option(help="A name for the result.")] = None,
) -> None:
    """Load a server with requests, and say how fast it answers.

    --concurrency: a closed loop of clients. --rate: requests that arrive by a Poisson process, however long the others take.
    """
    from bessemer.cli.named import given_options, option_of
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import write_json
    from bessemer.serving.bench import LoadConfig
    from bessemer.serving.bench import bench as load

    load_shape = ("concurrency", "rate", "burstiness", "requests", "warmup", "input_tokens", "output_tokens", "prompts")
    settings = given_options(context, *load_shape, "model", "temperature", "top_p", "seed", "ignore_eos")
    if extra_body is not None:
        settings["extra_body"] = _extra(extra_body)
    if goodput:
        settings["goodput"] = {name: limit for name, _, limit in (goal.partition(":") for goal in goodput)}
    if chat:
        settings["api"] = "chat"
    config = LoadConfig.parse(settings, option_of("bench serve"))
    measured = load(url, config, key=api_key, progress=progress_for_terminal())
    if save is not None:
        write_json(save, measured.as_json(url, config, label))
    _show(measured, config)


def _extra(given: str) -> Any:
    import json

    from bessemer.core.errors import ConfigError

    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body: not JSON ({error.msg})") from None


def _show(measured: LoadResult, config: LoadConfig) -> None:
    from rich.console import Console

    from bessemer.core.report import Column, Table
    from bessemer.serving.bench import MEASURES
    from bessemer.views.parts_terminal import show_parts

    figures = measured.figures
    arrivals = f"{config.concurrency} clients" if config.rate is None else f"{config.rate:g} requests/s"
    counted = [
        ("model", measured.model),
        ("load", arrivals),
        ("answered", f"{figures['completed']:,} in {figures['duration']:.1f} s"),
        ("failed", f"{figures['failed']:,}"),
        ("tokens of prompts", f"{figures['total_input_tokens']:,}"),
        ("tokens of answers", f"{figures['total_output_tokens']:,}"),
        ("requests/s", f"{figures['request_throughput']:.2f}"),
        ("tokens/s of answers", f"{figures['output_throughput']:,.1f}"),
        ("tokens/s in all", f"{figures['total_token_throughput']:,.1f}"),
    ]
    if figures["request_goodput"] is not None:
        counted.append(("good requests/s", f"{figures['request_goodput']:.2f}"))
    keys = ("mean", "median", "p90", "p99")
    times = []
    for name, meaning in MEASURES.items():
        values = [figures[f"{key}_{name}_ms"] for key in keys]
        times.append((name.upper(), *("–" if value is None else f"{value:,.1f}" for value in values), meaning))
    parts = [
        Table([Column(""), Column("", True)], counted),
        Table([Column("ms"), *(Column(key, True) for key in keys), Column("")], times),
    ]
    console = Console(highlight=False, soft_wrap=True)
    for drawn in show_parts(parts):
        console.print(drawn)
    for error, count in measured.errors.most_common(3):
        console.print(f"{count:,} failed: {error}", style="red", markup=False)
