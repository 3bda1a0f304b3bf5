"""Options of earlier versions. Imports nothing heavy: every command's file may."""

from __future__ import annotations

from typing import Any

import typer


def retired_option(old: str, new: str) -> Any:
    """An option of an earlier version, absent from the help. Raises ConfigError with its new name when it is given."""

    def refuse(value: Any) -> None:
        if value is not None:
            from bessemer.core.errors import ConfigError

            raise ConfigError(f"{old}: the option is now {new}")

    return typer.Option(old, hidden=True, callback=refuse)
