"""A package with entry points, made for a test as an installed one looks on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: str,
    entry_points: Mapping[str, Mapping[str, str]],
    version: str = "1.2",
) -> None:
    """Put a module `name` and its metadata into `folder`, and that on the path. entry_points: object by name by group."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [
        line
        for group, objects in entry_points.items()
        for line in (f"[{group}]", *(f"{plugin} = {place}" for plugin, place in objects.items()), "")
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
