"""`bessemer personalise`: an adapter of one user from their feedback; `bessemer person`: what is kept of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Device, Model, Runs

if TYPE_CHECKING:
    from bessemer.posttraining.personal import PersonalConfig

People = Annotated[Path, typer.Option(help="Folder with a folder for each person, as `serve --feedback` writes it.")]
Url = Annotated[
    str | None, typer.Option(help="A server of the base model, started with --adapter-root PEOPLE, that is to load or drop it.")
]
KeyVariable = Annotated[str, typer.Option(help="Environment variable that holds the server's admin key.")]


def personalise(
    context: typer.Context,
    model: Model,
    person: Annotated[str, typer.Argument(help="Name of the person, whose folder holds pairs.jsonl.")],
    people: People = Path("people"),
    minutes: Annotated[float | None, typer.Option(help="Longest time of the training.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the feedback (default 4).")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter (default 8).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate (default 2e-4).")] = None,
    least_gain: Annotated[
        float | None, typer.Option(help="Share of held-out pairs by which it must gain over the base model (default 0.1).")
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(help="Go on, and train again when there is new feedback; seconds between looks.", min=1),
    ] = None,
    url: Url = None,
    key_variable: KeyVariable = "BESSEMER_API_KEY",
    seed: Annotated[int, typer.Option(help="Seed of the order and of a new adapter.")] = 7,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Train an adapter on what one person preferred, and use it only where it is better on feedback that was held out.

    Exit code 0: it is in use, or there is too little feedback yet. 3: it was rolled back.
    """
    from bessemer.cli.named import given_options, model_source, option_of
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import person_folder
    from bessemer.posttraining.personal import PersonalConfig

    source, folder = model_source(model, runs), person_folder(people, person)
    if source.kind != "folder":
        raise ConfigError(f"{model}: it is no folder of a model; make one with bessemer import {model} FOLDER")
    given = given_options(context, "minutes", "epochs", "rank", "learning_rate", "least_gain")
    config = PersonalConfig.parse(given, option_of("personalise"))
    while True:
        # before the attempt: what is said while it trains is new
        size = _size(folder)
        line = _attempt(source.path, folder, config, seed, device)
        if line["decision"] == "used" and url is not None:
            _tell(url, key_variable, "load", {"lora_name": person, "lora_path": f"{person}/adapter", "load_inplace": True})
        if watch is None:
            raise typer.Exit(3 if line["decision"] == "rolled back" else 0)
        while _size(folder) == size:
            time.sleep(watch)


def _attempt(base: Path, folder: Path, config: PersonalConfig, seed: int, device: str) -> dict[str, Any]:
    from bessemer.core.progress import progress_for_terminal
    from bessemer.posttraining.personal import personalise as train

    line = train(base, folder, config, seed=seed, device=device, progress=progress_for_terminal())
    print(f"{folder.name}: {described(line)}")
    return line


def _size(folder: Path) -> int:
    from bessemer.posttraining.personal import PAIRS

    return (folder / PAIRS).stat().st_size if (folder / PAIRS).exists() else 0


def described(line: dict[str, Any]) -> str:
    """A line of the history in words."""
    if "new" not in line:
        return f"{line['decision']}: {line['reason']}"
    low, high = line["gain_95"]
    tested = f"{line['base']:.0%} to {line['new']:.0%} of {line['held_out']:,} held-out pairs, 95 %: {low:+.0%} to {high:+.0%}"
    return f"{line['decision']}: {line['reason']} ({tested}; {line['pairs']:,} pairs learnt)"


def person(
    name: Annotated[str, typer.Argument(help="Name of the person.")],
    people: People = Path("people"),
    export: Annotated[Path | None, typer.Option(help="Write everything that is kept to this ZIP file.")] = None,
    roll_back: Annotated[bool, typer.Option("--roll-back", help="Use the adapter before this one, or none.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Delete everything that is kept, for good.")] = False,
    url: Url = None,
    key_variable: KeyVariable = "BESSEMER_API_KEY",
    as_json: Annotated[bool, typer.Option("--json", help="Print what is kept as JSON.")] = False,
) -> None:
    """Show, export or delete what is kept of a person: their feedback, their adapter, and how it came to be."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import person_folder
    from bessemer.posttraining import personal

    folder = person_folder(people, name)
    if (export is not None) + roll_back + forget > 1:
        raise ConfigError("--export, --roll-back, --forget: one of them at a time")
    if export is not None:
        personal.export(folder, export)
        print(f"{export}: everything that is kept of {name}")
    elif roll_back:
        personal.roll_back(folder)
        if url is not None:
            if (folder / personal.ADAPTER).exists():
                _tell(url, key_variable, "load", {"lora_name": name, "lora_path": f"{name}/adapter", "load_inplace": True})
            else:
                _tell(url, key_variable, "unload", {"lora_name": name})
        print(f"{name}: rolled back")
    elif forget:
        # first: a server that cannot be reached would go on answering with it
        if url is not None:
            _tell(url, key_variable, "unload", {"lora_name": name})
        print(f"{name}: {personal.forget(folder):,} files deleted")
    else:
        kept = personal.kept_of(folder)
        if as_json:
            print(json.dumps(kept, ensure_ascii=False))
            return
        print(f"{name}: {kept['pairs']:,} pairs of feedback")
        for path, size in kept["files"].items():
            print(f"  {path}, {size:,} bytes")
        for line in kept["history"]:
            print(f"  {time.strftime('%Y-%m-%d %H:%M', time.localtime(line['time']))} {described(line)}")


def _tell(url: str, key_variable: str, what: str, body: dict[str, Any]) -> None:
    """Ask a server to load or to drop an adapter. One that has none to drop is told nothing new."""
    import os

    from bessemer.core.errors import ArtefactError
    from bessemer.core.http_client import ApiError, HttpClient, TransientError

    client = HttpClient(url.rstrip("/"), key_variable=key_variable if os.environ.get(key_variable) else "", timeout=60.0)
    try:
        client.post(f"/v1/{what}_lora_adapter", body)
    except ApiError as error:
        if what == "unload" and error.status == 404:
            return
        raise ArtefactError(f"{url}: the server does not {what} the adapter: {error}") from None
    except TransientError as error:
        raise ArtefactError(f"no server answers at {url}: {error}") from None
    print(f"{url}: {what}ed {body['lora_name']}", file=sys.stderr)
