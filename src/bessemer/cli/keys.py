"""`bessemer keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke the API keys of a server.",
    epilog="Example: bessemer keys add keys.jsonl anna\n\nbessemer serve smollm2 --keys keys.jsonl",
)

_File = Annotated[Path, typer.Argument(help="The file of keys that `bessemer serve --keys` reads.")]


@keys.command(epilog="Example: bessemer keys add keys.jsonl anna --requests-per-minute 60")
def add(
    file: _File,
    name: Annotated[str, typer.Argument(help="What the key is called in lists and logs.")],
    user: Annotated[str | None, typer.Option(help="In whose name its requests are made; the key's name.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="A group that the user is in; may be repeated.")] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may load and unload adapters, and see runs and their documents.")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests in a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens of prompts and answers in a minute.")] = None,
) -> None:
    """Make a key, and print it: it is shown this once, and the file holds its hash."""
    from bessemer.cli.named import option_of
    from bessemer.core.errors import ConfigError
    from bessemer.serving.keys import KeyRecord, hash_key, new_key, read_keys, write_keys

    records = read_keys(file) if file.exists() else []
    if name in [record.name for record in records]:
        raise ConfigError(f"{file} has a key '{name}' already; revoke it first, or choose another name")
    key = new_key()
    record = KeyRecord.parse(
        {
            "name": name,
            "hash": hash_key(key),
            "user": user,
            "groups": group or [],
            "admin": admin,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        },
        option_of("keys add"),
    )
    write_keys(file, [*records, record])
    print(key)


@keys.command("list", epilog="Example: bessemer keys list keys.jsonl")
def list_(file: _File) -> None:
    """The keys of a file, a line each."""
    from bessemer.serving.keys import read_keys

    for record in read_keys(file):
        limits = [f"{limit:,} {what} a minute" for limit, what in _limits(record.requests_per_minute, record.tokens_per_minute)]
        user = record.user or record.name
        print(" · ".join([record.name, f"user {user}", *(["admin"] if record.admin else []), *limits]))


@keys.command(epilog="Example: bessemer keys revoke keys.jsonl anna")
def revoke(file: _File, name: Annotated[str, typer.Argument(help="The key's name.")]) -> None:
    """Take a key out. A running server ends its streams within a second or two."""
    from bessemer.core.errors import ConfigError
    from bessemer.serving.keys import read_keys, write_keys

    records = read_keys(file)
    if name not in [record.name for record in records]:
        raise ConfigError(f"{file} has no key '{name}'")
    write_keys(file, [record for record in records if record.name != name])
    print(f"revoked {name}")


def _limits(requests: int | None, tokens: int | None) -> list[tuple[int, str]]:
    return [(limit, what) for limit, what in ((requests, "requests"), (tokens, "tokens")) if limit is not None]
