"""What a view is given: plain data, as the stages' manifests and files hold it. Nothing here reads a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """A figure to show large: `1.31M`, `parameters`."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of a run: how long its work took when it was done, its peak of memory, what it made in a few words."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None
    summary: str = ""
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, what should be said, and what the model says."""

    question: str
    expected: str
    answer: str
    correct: bool | None = None
    held_in: bool = False
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A stage that trained.

    metrics: the manifest's. records: the lines of `metrics.jsonl`. samples: those of `samples.jsonl`. baselines: bits
    per byte of what the model is compared with, by the name to show. answers: what the model said when asked.
    """

    metrics: Metrics = field(default_factory=dict)
    records: Sequence[Metrics] = ()
    samples: Sequence[Metrics] = ()
    baselines: Mapping[str, float] = field(default_factory=dict)
    answers: Sequence[Answer] = ()


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A run. What is absent has no section in the report.

    sentences: what was made, in plain words. next_steps: commands to type. data: data stage to its metrics, in order.
    tokenizer, model: the stage's metrics. evaluation: `results.json`. quantisation: `quality.json`. versions, host, commit: the
    manifests'. made: when, in UTC. recipe, lock: the files' text.
    """

    name: str
    description: str = ""
    sentences: Sequence[str] = ()
    figures: Sequence[KeyFigure] = ()
    next_steps: Sequence[str] = ()
    stages: Sequence[StageRun] = ()
    data: Mapping[str, Metrics] = field(default_factory=dict)
    tokenizer: Metrics | None = None
    model: Metrics | None = None
    pretraining: Training | None = None
    finetuning: Training | None = None
    evaluation: Metrics | None = None
    quantisation: Metrics | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    host: Metrics = field(default_factory=dict)
    commit: str | None = None
    made: str = ""
    recipe: str = ""
    lock: str = ""
