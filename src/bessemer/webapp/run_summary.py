"""Summaries of runs for the page: status, growing curves and samples, comparisons, sweeps, evaluations.

Loaded at the first request.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.report import KeyFigure, Part
from bessemer.evaluation.comparison import compare, comparison_parts, flip_parts, flips
from bessemer.evaluation.evaluation_folder import ITEMS_FILE, RESULTS_FILE, read_evaluation
from bessemer.pipeline.report import compare_runs, key_figures, run_report, stage_section
from bessemer.pipeline.run_folder import RunFolder, StageState, stage_states
from bessemer.webapp.access import missing, without_styles

#: Files that grow while a stage is at work, by what the page calls them.
GROWING = {"metrics": "metrics.jsonl", "samples": "samples.jsonl"}
#: Bytes of a growing file that are sent at once.
_AT_ONCE = 2_000_000
_MOST_DIGITS = 20


def figures(run: RunFolder) -> list[dict[str, str]]:
    """What the head of the run's report says."""
    return [_figure(one) for one in key_figures(run_report(run))]


def section(run: RunFolder, stage: str) -> dict[str, str]:
    """A finished stage's section of the report, as HTML; empty where it has none."""
    found = stage_section(run_report(run), stage)
    return {"title": "", "html": ""} if found is None else {"title": found.title, "html": _drawn(found.parts, stage)}


def beside(run: RunFolder, other: RunFolder) -> str:
    """Two runs, as HTML."""
    return _drawn(compare_runs(run, other), "beside")


def evaluations_beside(runs: Path, first: str, second: str) -> str:
    """Two evaluations and the items that flipped, as HTML. Raises ApiError (404) for one that is not there."""
    known = evaluations(runs)
    for name in (first, second):
        if name not in known:
            raise missing(f"there is no evaluation {name!r}")
    both = [read_evaluation(known[name], name) for name in (first, second)]
    parts = [*comparison_parts(compare(*both)), *flip_parts(flips(*both), (first, second))]
    return _drawn(parts, "evaluations")


def _drawn(parts: Sequence[Part], name: str) -> str:
    """Parts of a report as HTML for the page. name: begins the ids of what is drawn."""
    # curves need matplotlib, which a server may lack; all else of a run is told without
    from bessemer.views.report import draw_parts

    return without_styles(str(draw_parts(parts, (f"{name}-{number}" for number in count(1)))))


def in_short(run: RunFolder) -> dict[str, Any]:
    """A run in the list."""
    try:
        states = stage_states(run)
    except (ArtefactError, KeyError, TypeError, AttributeError) as error:
        # one that cannot be read does not hide the others
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


def _figure(figure: KeyFigure) -> dict[str, str]:
    return {"label": figure.label, "value": figure.value, "note": figure.note}


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
    """A stage of a run. Raises ApiError (404) for one that it has not."""
    for state in stage_states(run):
        if state.name == name:
            return state
    raise missing(f"the run {run.name!r} has no stage {name!r}")


def grown(path: Path, after: str) -> dict[str, Any]:
    """Whole records of a growing file behind a place, at most `_AT_ONCE` bytes of them.

    after: `file-bytes`, as an earlier answer gave it; "" begins. A file that was written anew, as by a run that went on from an
    earlier step, begins again, and `restarted` says so.
    """
    try:
        with path.open("rb") as stream:
            file = path.stat()
            identity, _, place = after.partition("-")
            is_place = place.isdecimal() and len(place) < _MOST_DIGITS
            is_same = identity == str(file.st_ino) and is_place and int(place) <= file.st_size
            start = int(place) if is_same else 0
            stream.seek(start)
            content = stream.read(_AT_ONCE)
            if b"\n" not in content:
                # a line that is longer
                content += stream.readline()
    except FileNotFoundError:
        return {"after": "", "restarted": bool(after), "records": []}
    whole = content[: content.rfind(b"\n") + 1]
    # what is no number there is none here: JSON has no word for it
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
    """Finished evaluations in the folder of the runs, by their place in it."""
    found = (path.parent for depth in ("*", "*/*", "*/*/*") for path in runs.glob(f"{depth}/{ITEMS_FILE}"))
    return {
        str(folder.relative_to(runs)): folder
        for folder in found
        if not folder.relative_to(runs).parts[0].startswith(".") and (folder / RESULTS_FILE).is_file()
    }
