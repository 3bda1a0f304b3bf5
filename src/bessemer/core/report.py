"""Report data: the parts of a stage's section, and the input of a stage's report functions.

Values only, nothing is drawn here: `views.report` draws each kind for a page, `views.parts_terminal` for a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bessemer.core.metrics import label, percent, short_number

Metrics: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Heading:
    """A heading inside a section. level: 3 of a subsection, 4 of a part of one."""

    text: str
    level: int = 3


@dataclass(frozen=True)
class Text:
    """A paragraph: a remark, or with `lead` the one that says what the section shows."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Verbatim:
    """A text whose lines and white space stay as they are: a recipe, a list of places."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Metrics by name, shown in the units that the names tell (`metrics.shown`). Nested values and hashes are left out."""

    values: Metrics


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and whether it holds numbers (set to the right)."""

    heading: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell with more than text.

    share: length of a bar, 0 to 1, before the text. rest: length of the hatched bar after it, for the removed part.
    remark: added in a soft colour. warning: the text names a fault.
    """

    text: str = ""
    share: float | None = None
    rest: float = 0.0
    strong: bool = False
    remark: str = ""
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells, as many in each as there are columns.

    bars: size of the bars where the second column holds nothing else; "" for bars next to figures.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Cell]]
    bars: Literal["", "small", "large"] = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), [column.heading for column in self.columns]


@dataclass(frozen=True)
class Series:
    """One curve. Points whose y is missing or not finite are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]

    def points(self) -> tuple[list[float], list[float]]:
        """The points that can be drawn."""
        drawn = [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None and math.isfinite(y)]
        return [x for x, _ in drawn], [y for _, y in drawn]


@dataclass(frozen=True)
class Curves:
    """Curves over a common x axis; nothing is drawn when no series has a point.

    title: what is drawn, with its unit. baselines: dashed horizontal lines, value by label. wide: as wide as the page,
    else half of it. from_zero: the y axis begins at 0. averaged: long curves are faint, with their moving average on top.
    """

    series: Sequence[Series]
    title: str
    x_label: str = "step"
    baselines: Mapping[str, float] = field(default_factory=dict)
    wide: bool = True
    from_zero: bool = False
    averaged: bool = False


@dataclass(frozen=True)
class Bin:
    """A range of scores with its documents; wholly kept or wholly dropped by the score's own limits."""

    start: float
    end: float
    count: int
    kept: bool


@dataclass(frozen=True)
class Histogram:
    """The distribution of one score. documents: their number, those without a score included.

    low, high: the ends of the axis; the outermost bins may extend beyond them without end. lowest, highest: the score's limits.
    outside: documents that break them. alone: documents that break no other limit; None when they were not counted.
    """

    title: str
    documents: int
    low: float
    high: float
    bins: Sequence[Bin]
    lowest: float | None = None
    highest: float | None = None
    outside: int | None = None
    alone: int | None = None

    @property
    def limit(self) -> str:
        """The limits in words: `at least 3, at most 10`."""
        words = [f"at least {short_number(self.lowest)}"] if self.lowest is not None else []
        return ", ".join([*words, *([f"at most {short_number(self.highest)}"] if self.highest is not None else [])])

    @property
    def effect(self) -> str:
        """What the limits drop, in words; empty where there are none."""
        if not self.limit or self.outside is None:
            return self.limit
        if not self.outside:
            return f"{self.limit}: drops none"
        return f"{self.limit}: drops {self.outside:,} ({percent(self.outside / self.documents)}), {self.alone:,} for this alone"


@dataclass(frozen=True)
class Histograms:
    """Histograms side by side."""

    histograms: Sequence[Histogram]


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers as shades: `values[row][column]`, NaN for a number that is missing.

    row_kind, column_kind: what a row and a column are, in one word. logarithmic: shades follow the logarithm.
    """

    title: str
    values: Sequence[Sequence[float]]
    row_names: Sequence[str]
    column_names: Sequence[str]
    row_kind: str
    column_kind: str
    logarithmic: bool = False


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps side by side."""

    maps: Sequence[HeatMap]


@dataclass(frozen=True)
class Tokens:
    """A text cut into tokens, which joined are the text. listed: unrelated tokens, shown side by side."""

    pieces: Sequence[str]
    listed: bool = False


@dataclass(frozen=True)
class Document:
    """A document to read: its text, source, id to look it up by, and why it was dropped."""

    text: str
    source: str = ""
    id: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Documents:
    """Documents one below the other."""

    documents: Sequence[Document]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, the expected answer, and a model's. held_in: the model was trained on the question."""

    question: str
    expected: str
    answer: str
    correct: bool | None = None
    held_in: bool = False
    model: str = ""


@dataclass(frozen=True)
class Answers:
    """Questions with their answers, one below the other."""

    answers: Sequence[Answer]


@dataclass(frozen=True)
class Sample:
    """What a model in training wrote after a prompt, at a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Samples:
    """Samples of a model, by step."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Folded:
    """Parts that are folded until a reader opens them. summary: the visible line, as text or cells."""

    summary: str | Sequence[Cell]
    parts: Sequence[Part]


#: What a section is made of.
Part: TypeAlias = (
    Heading | Text | Verbatim | Facts | Table | Curves | Histograms | HeatMaps | Tokens | Documents | Answers | Samples | Folded
)


@dataclass(frozen=True)
class Section:
    """A section of the report. headline: `bessemer show RUN` prints it too, for results that a reader asks for first."""

    title: str
    parts: Sequence[Part]
    headline: bool = False


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """A figure shown large: `1.31M`, `parameters`."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """The input of a finished stage's report functions.

    name: as in the recipe. kind: of the stage. metrics: the manifest's. folder: the artefact's. records: the lines of its
    `metrics.jsonl`. run: the run that the stage belongs to, with its other stages.
    """

    name: str
    kind: str
    metrics: Metrics
    folder: Path
    records: Sequence[Metrics] = ()
    run: RunReport = field(default_factory=lambda: RunReport(name="", folder=Path()), repr=False, compare=False)

    def titled(self, title: str) -> str:
        """A title, and the stage's name behind it when the recipe names the stage otherwise than its kind."""
        return title if self.name == self.kind else f"{title}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run's name, folder, and its finished stages in the recipe's order."""

    name: str
    folder: Path
    stages: Sequence[StageReport] = ()

    def of_kind(self, kind: str) -> list[StageReport]:
        """The finished stages of a kind, in order."""
        return [stage for stage in self.stages if stage.kind == kind]

    def last_metrics(self, kind: str) -> Metrics:
        """The metrics of the last stage of a kind; empty when the run has none."""
        stages = self.of_kind(kind)
        return stages[-1].metrics if stages else {}


#: A stage's section; None when the stage has nothing to show.
ReportFunction: TypeAlias = Callable[[StageReport], Section | None]


def facts_section(stage: StageReport) -> Section:
    """The section of a stage that has none of its own: its figures."""
    return Section(label(stage.name), [Facts(stage.metrics)])


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
