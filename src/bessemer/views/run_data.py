"""A run as plain data, for its views. Nothing here reads a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bessemer.core.report import KeyFigure, Metrics, Section


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of a run: seconds and peak memory of its work, and in a few words what it made."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None
    summary: str = ""
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A run. What is absent has no section in the report.

    sentences: what was made, in plain words. next_steps: commands to type. sections: the stages' own, in order.
    versions, host, commit: the manifests'. made: when, in UTC. recipe, lock: the files' text.
    """

    name: str
    description: str = ""
    sentences: Sequence[str] = ()
    figures: Sequence[KeyFigure] = ()
    next_steps: Sequence[str] = ()
    stages: Sequence[StageRun] = ()
    sections: Sequence[Section] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    host: Metrics = field(default_factory=dict)
    commit: str | None = None
    made: str = ""
    recipe: str = ""
    lock: str = ""
