"""Metrics of a stage: `metrics.jsonl`, and the names and values of metrics in words.

`metrics.jsonl` has one JSON object a step, with stable keys, readable by pandas. A metric's unit follows from its name:
`training_bytes` is shown as `20.3 MB`, `seconds` as `4 min 28 s`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

#: The file's name in a stage's folder.
METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """A further receiver of the records, such as TensorBoard."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Take one record: numbers by key."""

    def close(self, *, failed: bool) -> None:
        """End: no record follows. failed: whether an error ended the run."""


class MetricsLog:
    """Appends records to a `metrics.jsonl`. Each has an integer `step`; on resume, records past it are cut away."""

    def __init__(
        self, path: Path, resume_at: int | None = None, *, writes: bool = True, trackers: Sequence[Tracker] = ()
    ) -> None:
        """Open for appending. `resume_at`: the step that training goes on from; records of later steps, and a last
        line that a crash cut in two, are removed. None starts a new file. writes: False for a process whose records
        another one writes; no file is opened. trackers: get every record, and are closed with the file."""
        self._trackers = trackers if writes else ()
        self._stream: IO[str] | None = None
        if not writes:
            return
        kept = [] if resume_at is None else [record for record in read_metrics(path) if record["step"] <= resume_at]
        temporary = path.with_suffix(".rewrite")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Append one record and hand it to the system, so that a killed run keeps it."""
        if self._stream is not None:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self, *, failed: bool = False) -> None:
        """Close the file, and the trackers. failed: because of an error."""
        if self._stream is not None:
            self._stream.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; an unfinished last line is left out; empty when there is no file."""
    if not path.exists():
        return []
    records = []
    # not `splitlines`, which also breaks at a few characters that JSON writes as they are
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_ABBREVIATIONS = {
    "kv": "key-value",
    "bos": "begin",
    "eos": "end",
    "mb": "MB",
    "flops": "FLOPs",
    "gflops": "GFLOPs",
    "mfu": "Share of the peak (MFU)",
    "n": "questions",
    "vocab": "vocabulary",
}
_BASELINES = {
    "xz": "xz −9",
    "witten_bell_5gram": "Witten–Bell 5-gram",
    "witten_bell_6gram": "Witten–Bell 6-gram",
    "byte": "Every byte a token",
    "character": "Every character a token",
    "word": "Every word a token",
}

#: Note on the bits per byte of a model whose tokenizer does not restore texts.
LOSSY_NOTE = (
    "Its tokenizer loses text (white space, characters that it has no token for), and the model predicts nothing of what is "
    "lost: these bits per byte come out too low, and cannot be compared with those of a lossless tokenizer or a compressor."
)
#: Ends of names that count bytes.
_BYTES = ("bytes", "bytes_in", "bytes_out", "kv_bytes_per_token")


def duration(seconds: float) -> str:
    """Seconds in readable units: `0.4 s`, `48 s`, `6 min 12 s`, `3 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in readable units, powers of 1,000: `812 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def short_count(count: float) -> str:
    """A large count in three figures: `1.31M`, `9.9M`, `812`."""
    for limit, unit in _COUNTS:
        if abs(count) >= limit * 0.9995:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.3g}" if isinstance(count, float) and not count.is_integer() else f"{count:.0f}"


def percent(share: float) -> str:
    """A share as a percentage: `8.1 %`, `0.04 %`."""
    value = 100 * share
    decimals = 0 if abs(value) >= 99.95 or value == 0 else 1 if abs(value) >= 1 else 2
    return f"{value:.{decimals}f} %"


def short_number(value: float | None) -> str:
    """A score or a limit in three figures, empty for None: `0.65`, `12.3`, `100,000`."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _is_duration(name: str) -> bool:
    return name.endswith("seconds") and "per_" not in name


def shown(name: str, value: Any) -> str:
    """A metric's value, in the unit that its name tells (`…_bytes`, `…_seconds`, `…_share`, `exact_match…`)."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    # unused bytes are tokens
    if name.endswith(_BYTES) and not name.startswith("unused"):
        return size(value)
    if _is_duration(name):
        return duration(value)
    if name.endswith(("_share", "mfu")) or name.startswith(("exact_match", "accuracy", "share_")):
        return percent(value)
    if name.startswith("flops"):
        return short_count(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def label(name: str) -> str:
    """A metric's name in words: `kv_bytes_per_token` is `Key-value bytes per token`."""
    if _is_duration(name):
        name = name.removesuffix("seconds") + "time"
    words = [_ABBREVIATIONS.get(word, word) for word in name.replace("-", "_").split("_")]
    text = " ".join(words).replace("rouge l", "ROUGE-L").replace("held in", "held in (memorised)")
    return text[:1].upper() + text[1:]


def baseline_label(name: str) -> str:
    """A baseline's name as the field writes it."""
    return _BASELINES.get(name, label(name))


def is_lossy(tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether decoding does not restore texts, by the metrics of a tokenize stage."""
    return tokenizer is not None and tokenizer.get("lossless") is False


def simple_values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are one number or word: what a list of facts shows. Hashes and nested values are left out."""
    return {
        name: value
        for name, value in metrics.items()
        if (value is None or isinstance(value, (bool, int, float, str))) and not name.endswith(("hash", "fingerprint"))
    }
