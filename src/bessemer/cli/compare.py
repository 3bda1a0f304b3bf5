"""`bessemer compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    first: Annotated[str, typer.Argument(help="A run's name or folder.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Compare two runs: the settings that differ, then the figures."""
    from rich.console import Console
    from rich.table import Table

    from bessemer.cli.named import find_run
    from bessemer.pipeline.run_folder import RunFolder

    folders = [find_run(name, runs) for name in (first, second)]
    manifests = []
    for folder in folders:
        run = RunFolder(folder.parent, folder.name)
        manifests.append({stage: run.manifest(stage) or {} for stage in run.stages()})
    stages = list(dict.fromkeys([*manifests[0], *manifests[1]]))
    console = Console(highlight=False)
    names = [folder.name for folder in folders]
    for title, section in (("Settings that differ", "settings"), ("Figures", "metrics")):
        table = Table("stage", "key", *names, title=title, title_justify="left")
        for stage in stages:
            sides = [_flat(side.get(stage, {}).get(section, {})) for side in manifests]
            for key in dict.fromkeys([*sides[0], *sides[1]]):
                values = [side.get(key) for side in sides]
                if section == "metrics" and not any(isinstance(value, (int, float)) for value in values):
                    continue
                # `bessemer show A --against B` has them
                if section == "metrics" and key.startswith(_DETAILS):
                    continue
                if values[0] != values[1] or (section == "metrics" and key in _ALWAYS):
                    table.add_row(stage, key, *map(_shown, values))
        console.print(table if table.row_count else f"{title}: none")


#: Figures worth seeing even when they are equal.
_ALWAYS = {"bits_per_byte", "parameters", "bytes_per_token"}
#: Figures of which there are dozens.
_DETAILS = ("by_domain.",)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {
        key: value for name, item in values.items() for key, value in _flat(item, f"{path}.{name}" if path else name).items()
    }


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
