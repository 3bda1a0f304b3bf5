"""Summaries of runs: status, growing curves and samples, comparisons, sweeps, evaluations. Loaded at the first request."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.report import Part
from bessemer.evaluation.comparison import compare, comparison_parts, flip_parts, flips
from bessemer.evaluation.evaluation_folder import ITEMS_FILE, RESULTS_FILE, read_evaluation
from bessemer.pipeline.report import compare_runs, key_figures, run_report, stage_section
from bessemer.pipeline.run_folder import RunFolder, StageState, stage_states
from bessemer.webapp.access import missing, without_styles

#: Files that grow while a stage runs, by their names in the routes.
GROWING = {"metrics": "metrics.jsonl", "samples": "samples.jsonl"}
#: Most bytes of a growing file in one response.
_AT_ONCE = 2_000_000
_MOST_DIGITS = 20


def figures(run: RunFolder) -> list[dict[str, str]]:
    """The key figures of the run's report."""
    return [{"label": figure.label, "value": figure.value, "note": figure.note} for figure in key_figures(run_report(run))]


def section(run: RunFolder, stage: str) -> dict[str, str]:
    """A finished stage's section of the report, as HTML; empty where it has none."""
    section = stage_section(run_report(run), stage)
    if section is None:
        return {"title": "", "html": ""}
    return {"title": section.title, "html": _html(section.parts, stage)}


def run_comparison(run: RunFolder, other: RunFolder) -> str:
    """A comparison of two runs, as HTML."""
    return _html(compare_runs(run, other), "beside")


def evaluation_comparison(runs: Path, first: str, second: str) -> str:
    """A comparison of two evaluations with the items that flipped, as HTML. Raises ApiError (404) for an unknown one."""
    known = evaluations(runs)
    for name in (first, second):
        if name not in known:
            raise missing(f"there is no evaluation {name!r}")
    both = [read_evaluation(known[name], name) for name in (first, second)]
    parts = [*comparison_parts(compare(*both)), *flip_parts(flips(*both), (first, second))]
    return _html(parts, "evaluations")


def _html(parts: Sequence[Part], name: str) -> str:
    """Parts of a report as HTML. name: prefix of the ids of drawings."""
    # needs matplotlib, which a server may lack
    from bessemer.views.report import draw_parts

    return without_styles(str(draw_parts(parts, (f"{name}-{number}" for number in count(1)))))


def in_short(run: RunFolder) -> dict[str, Any]:
    """A run in the list of runs. One that cannot be read has the reason as its description."""
    try:
        states = stage_states(run)
    except (ArtefactError, KeyError, TypeError, AttributeError) as error:
        return {
            "name": run.name,
            "description": f"cannot be read: {error}",
            "stages": 0,
            "done": 0,
            "at_work": None,
            "seconds": 0,
            "changed": 0.0,
        }
    at_work = next((state for state in states if state.status in ("running", "interrupted", "failed")), None)
    changed = max((path.stat().st_mtime for path in (run.folder / "run.json", *run.folder.glob("working.json"))), default=0.0)
    return {
        "name": run.name,
        "description": run.record()["recipe"].get("description", ""),
        "stages": len(states),
        "done": sum(state.status == "done" for state in states),
        "at_work": at_work and {"stage": at_work.name, "status": at_work.status, "problem": at_work.problem},
        "seconds": sum(state.seconds or 0 for state in states),
        "changed": changed,
    }


def at_length(run: RunFolder) -> dict[str, Any]:
    """A run with its stages."""
    record, states = run.record(), stage_states(run)
    return {
        "name": run.name,
        "description": record["recipe"].get("description", ""),
        "stages": [_shown(state) for state in states],
        "report": (run.folder / "report.html").is_file(),
    }


def _shown(state: StageState) -> dict[str, Any]:
    return {
        "name": state.name,
        "kind": state.kind,
        "feeds": list(state.feeds),
        "status": state.status,
        "key": state.key,
        "steps": state.steps,
        "started": state.started,
        "seconds": state.seconds,
        "summary": state.summary,
        "problem": state.problem,
        **{what: state.folder is not None and (state.folder / file).is_file() for what, file in GROWING.items()},
        "documents": state.folder is not None and (state.folder / "documents").is_dir(),
    }


def stage_of(run: RunFolder, name: str) -> StageState:
    """A stage of a run. Raises ApiError (404) for an unknown one."""
    for state in stage_states(run):
        if state.name == name:
            return state
    raise missing(f"the run {run.name!r} has no stage {name!r}")


def grown(path: Path, after: str) -> dict[str, Any]:
    """Complete records of a growing file from a position on, at most `_AT_ONCE` bytes.

    after: the position, `inode-bytes` from an earlier response; "" for the start. A replaced file, as that of a run resumed
    from an earlier step, is read from its start, and `restarted` is true.
    """
    try:
        with path.open("rb") as stream:
            file = path.stat()
            inode, _, position = after.partition("-")
            is_number = position.isdecimal() and len(position) < _MOST_DIGITS
            is_same = inode == str(file.st_ino) and is_number and int(position) <= file.st_size
            start = int(position) if is_same else 0
            stream.seek(start)
            content = stream.read(_AT_ONCE)
            if b"\n" not in content:
                # a record longer than that
                content += stream.readline()
    except FileNotFoundError:
        return {"after": "", "restarted": bool(after), "records": []}
    whole = content[: content.rfind(b"\n") + 1]
    # NaN and infinities become null: the response is JSON
    records = [json.loads(line, parse_constant=lambda name: None) for line in whole.splitlines()]
    return {
        "after": f"{file.st_ino}-{start + len(whole)}",
        "restarted": bool(after) and not is_same,
        "records": records,
        "more": start + len(whole) < file.st_size and bool(whole),
    }


def sweeps(folder: Path) -> Iterator[dict[str, Any]]:
    """The tables of sweeps."""
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            names, *rows = [*csv.reader(stream)] or [[]]
        yield {"name": path.stem, "columns": names, "rows": rows}


def evaluations(runs: Path) -> Mapping[str, Path]:
    """Folders of finished evaluations, by their path below the folder of the runs."""
    folders = (path.parent for depth in ("*", "*/*", "*/*/*") for path in runs.glob(f"{depth}/{ITEMS_FILE}"))
    return {
        str(folder.relative_to(runs)): folder
        for folder in folders
        if not folder.relative_to(runs).parts[0].startswith(".") and (folder / RESULTS_FILE).is_file()
    }
