"""What the page of runs asks: how far each has come, its curves as they grow, and two beside each other."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.core.report import KeyFigure
from bessemer.evaluation.comparison import compare as compare_evaluations
from bessemer.evaluation.comparison import flips
from bessemer.evaluation.comparison_report import comparison_parts, flip_parts
from bessemer.evaluation.evaluation_folder import ITEMS_FILE, RESULTS_FILE, read_evaluation
from bessemer.pipeline.report import key_figures, run_report, stage_section
from bessemer.pipeline.run_comparison import compare_runs
from bessemer.pipeline.run_folder import RunFolder, run_names
from bessemer.pipeline.run_state import StageState, stage_states
from bessemer.serving.bodies import ApiError
from bessemer.serving.clients import caller_of
from bessemer.views.parts import draw_parts
from bessemer.webapp.drawn import without_styles

#: Files that grow while a stage is at work, by what the page calls them.
_GROWING = {"metrics": "metrics.jsonl", "samples": "samples.jsonl"}
#: Bytes of a growing file that are sent at once.
_AT_ONCE = 2_000_000
#: The report's own file: it needs nothing but its styles, and whatever it held could reach nothing here.
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"

Result = TypeVar("Result")


class RunsApi:
    """The routes. runs: the folder of the runs; None: none are shown."""

    def __init__(self, runs: Path | None) -> None:
        self._runs = runs

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/inspect")
        for path, answer in (
            ("/runs", self.all),
            ("/runs/{run}", self.one),
            ("/runs/{run}/figures", self.figures),
            ("/runs/{run}/report", self.report),
            ("/runs/{run}/stages/{stage}/section", self.section),
            ("/runs/{run}/stages/{stage}/{what}", self.grown),
            ("/runs/{run}/beside/{other}", self.beside),
            ("/sweeps", self.sweeps),
            ("/evaluations", self.evaluations),
            ("/evaluations/beside", self.evaluations_beside),
        ):
            router.add_api_route(path, answer, methods=["GET"], response_model=None)
        return router

    async def all(self, request: Request) -> dict[str, Any]:
        folder = self._folder(request)
        return {"runs": await off_the_loop(lambda: [_in_short(RunFolder(folder, name)) for name in run_names(folder)])}

    async def one(self, request: Request, run: str) -> dict[str, Any]:
        found = self._run(request, run)
        return await off_the_loop(lambda: _at_length(found))

    async def figures(self, request: Request, run: str) -> dict[str, Any]:
        found = self._run(request, run)
        return {"figures": [_figure(one) for one in await off_the_loop(lambda: key_figures(run_report(found)))]}

    async def report(self, request: Request, run: str) -> Response:
        path = self._run(request, run).folder / "report.html"
        if not path.is_file():
            raise missing(f"the run {run!r} has no report yet")
        content = await off_the_loop(path.read_bytes)
        return HTMLResponse(content, headers={"Content-Security-Policy": _REPORT_POLICY, "Cache-Control": "no-cache"})

    async def section(self, request: Request, run: str, stage: str) -> dict[str, Any]:
        found = self._run(request, run)

        def drawn() -> dict[str, Any]:
            section = stage_section(run_report(found), stage)
            if section is None:
                return {"title": "", "html": ""}
            ids = (f"{stage}-{number}" for number in count(1))
            return {"title": section.title, "html": without_styles(str(draw_parts(section.parts, ids)))}

        return await off_the_loop(drawn)

    async def grown(self, request: Request, run: str, stage: str, what: str, after: str = "") -> dict[str, Any]:
        if what not in _GROWING:
            raise missing(f"a stage has {', '.join(_GROWING)} and section, not {what!r}")
        state = await off_the_loop(lambda: _stage(self._run(request, run), stage))
        folder = state.folder
        if folder is None:
            return {"status": state.status, "after": "", "restarted": bool(after), "records": []}
        grown = await off_the_loop(lambda: _grown(folder / _GROWING[what], after))
        return {"status": state.status, **grown}

    async def beside(self, request: Request, run: str, other: str) -> dict[str, Any]:
        both = [self._run(request, name) for name in (run, other)]

        def drawn() -> dict[str, Any]:
            return {"html": without_styles(str(draw_parts(compare_runs(*both), _ids("beside"))))}

        return await off_the_loop(drawn)

    async def sweeps(self, request: Request) -> dict[str, Any]:
        folder = self._folder(request)
        return {"sweeps": await off_the_loop(lambda: list(_sweeps(folder / "sweeps")))}

    async def evaluations(self, request: Request) -> dict[str, Any]:
        folder = self._folder(request)
        return {"evaluations": await off_the_loop(lambda: sorted(_evaluations(folder)))}

    async def evaluations_beside(self, request: Request, first: str, second: str) -> dict[str, Any]:
        folder = self._folder(request)

        def drawn() -> dict[str, Any]:
            known = _evaluations(folder)
            for name in (first, second):
                if name not in known:
                    raise missing(f"there is no evaluation {name!r}")
            both = [read_evaluation(known[name], name) for name in (first, second)]
            parts = [*comparison_parts(compare_evaluations(*both)), *flip_parts(flips(*both), (first, second))]
            return {"html": without_styles(str(draw_parts(parts, _ids("evaluations"))))}

        return await off_the_loop(drawn)

    def _folder(self, request: Request) -> Path:
        check_owner(request)
        if self._runs is None:
            raise ApiError(
                "this server shows no runs: it listens to other machines, and asks for no key", status=403, code="not_allowed"
            )
        return self._runs

    def _run(self, request: Request, name: str) -> RunFolder:
        return named_run(self._folder(request), name)


def check_owner(request: Request) -> None:
    """Raises ApiError (403) for a key that may not see what models are made of: runs, and the documents in them."""
    client = caller_of(request).client
    if client.id and not client.is_admin:
        raise ApiError("runs and their documents are shown with an admin key", status=403, code="not_allowed")


def named_run(runs: Path, name: str) -> RunFolder:
    """The run of a name. Raises ApiError (404) for anything that is no run's name, a path among them."""
    if name not in run_names(runs):
        raise missing(f"there is no run {name!r}")
    return RunFolder(runs, name)


async def off_the_loop(work: Callable[[], Result]) -> Result:
    """Work beside the event loop; what is wrong on the disk is the client's to read."""
    try:
        return await asyncio.to_thread(work)
    except (ArtefactError, RequestError) as error:
        raise ApiError(str(error), status=404, code="not_available") from None


def missing(reason: str) -> ApiError:
    """The error of something that is not there."""
    return ApiError(reason, status=404, code="not_found")


def _ids(name: str) -> Iterator[str]:
    return (f"{name}-{number}" for number in count(1))


def _in_short(run: RunFolder) -> dict[str, Any]:
    states = stage_states(run)
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


def _at_length(run: RunFolder) -> dict[str, Any]:
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
        **{what: state.folder is not None and (state.folder / file).is_file() for what, file in _GROWING.items()},
        "documents": state.folder is not None and (state.folder / "documents").is_dir(),
    }


def _stage(run: RunFolder, name: str) -> StageState:
    for state in stage_states(run):
        if state.name == name:
            return state
    raise missing(f"the run {run.name!r} has no stage {name!r}")


def _grown(path: Path, after: str) -> dict[str, Any]:
    """Whole records of a growing file behind a place, at most `_AT_ONCE` bytes of them.

    after: `file-bytes`, as an earlier answer gave it; "" begins. A file that was written anew, as by a run that went on from an
    earlier step, begins again, and `restarted` says so.
    """
    try:
        with path.open("rb") as stream:
            file = path.stat()
            identity, _, place = after.partition("-")
            is_same = identity == str(file.st_ino) and place.isdecimal() and int(place) <= file.st_size
            start = int(place) if is_same else 0
            stream.seek(start)
            content = stream.read(_AT_ONCE)
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


def _sweeps(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            names, *rows = [*csv.reader(stream)] or [[]]
        yield {"name": path.stem, "columns": names, "rows": rows}


def _evaluations(runs: Path) -> Mapping[str, Path]:
    """Finished evaluations in the folder of the runs, by their place in it."""
    found = (path.parent for depth in ("*", "*/*", "*/*/*") for path in runs.glob(f"{depth}/{ITEMS_FILE}"))
    return {
        str(folder.relative_to(runs)): folder
        for folder in found
        if not folder.relative_to(runs).parts[0].startswith(".") and (folder / RESULTS_FILE).is_file()
    }
