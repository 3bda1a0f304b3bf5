"""Two runs beside each other: the settings that differ, and the figures of their stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bessemer.core.report import Column, Heading, Part, Table, Text
from bessemer.pipeline.run_folder import RunFolder

#: Figures worth seeing even when they are equal.
_ALWAYS = {"bits_per_byte", "parameters", "bytes_per_token"}
#: Figures of which there are dozens; `bessemer show A --against B` has them.
_DETAILS = ("by_domain.",)
_LONGEST = 40


def compare_runs(first: RunFolder, second: RunFolder) -> list[Part]:
    """A table of settings and one of figures, stage by stage."""
    manifests = [{stage: run.manifest(stage) or {} for stage in run.stages()} for run in (first, second)]
    parts: list[Part] = []
    for title, section in (("Settings that differ", "settings"), ("Figures", "metrics")):
        rows = [
            (stage, key, *map(_shown, values))
            for stage in dict.fromkeys([*manifests[0], *manifests[1]])
            for key, values in _sides(*(_flat(one.get(stage, {}).get(section, {})) for one in manifests)).items()
            if _is_shown(section, key, values)
        ]
        columns = [Column("Stage"), Column("Key"), Column(first.name, True), Column(second.name, True)]
        parts += [Heading(title), Table(columns, rows) if rows else Text("None.")]
    return parts


def _sides(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])}


def _is_shown(section: str, key: str, values: tuple[Any, Any]) -> bool:
    if section == "metrics" and (key.startswith(_DETAILS) or not any(isinstance(value, (int, float)) for value in values)):
        return False
    return values[0] != values[1] or (section == "metrics" and key in _ALWAYS)


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
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
