"""Routes of the page of runs: their progress, growing curves, reports, and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from bessemer.pipeline import run_names
from bessemer.webapp.access import Result, missing, named_run, off_the_loop, shown_runs

#: The report is a file of its own with inline styles; whatever else it holds reaches nothing here.
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def _summary() -> ModuleType:
    # loads the report's drawings, which takes seconds: not when the server starts
    from bessemer.webapp import run_summary

    return run_summary


class RunsApi:
    """The routes. runs: the folder of the runs; None: none are shown."""

    def __init__(self, runs: Path | None) -> None:
        self._runs = runs

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        for path, endpoint in (
            ("/runs", self.all),
            ("/runs/{run}", self.one),
            ("/runs/{run}/figures", self.figures),
            ("/runs/{run}/report", self.report),
            ("/runs/{run}/stages/{stage}/section", self.section),
            ("/runs/{run}/stages/{stage}/{what}", self.grown),
            ("/runs/{run}/beside/{other}", self.compare),
            ("/sweeps", self.sweeps),
            ("/evaluations", self.evaluations),
            ("/evaluations/beside", self.compare_evaluations),
        ):
            router.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        return router

    async def _read(self, request: Request, work: Callable[[Path], Result]) -> Result:
        """Run work on the folder of the runs in a thread, for a client that may see them."""
        runs = shown_runs(request, self._runs)
        return await off_the_loop(lambda: work(runs))

    async def all(self, request: Request) -> dict[str, Any]:
        return await self._read(
            request, lambda runs: {"runs": [_summary().in_short(named_run(runs, name)) for name in run_names(runs)]}
        )

    async def one(self, request: Request, run: str) -> dict[str, Any]:
        return await self._read(request, lambda runs: dict(_summary().at_length(named_run(runs, run))))

    async def figures(self, request: Request, run: str) -> dict[str, Any]:
        return await self._read(request, lambda runs: {"figures": _summary().figures(named_run(runs, run))})

    async def report(self, request: Request, run: str) -> Response:
        def read(runs: Path) -> bytes:
            path = named_run(runs, run).folder / "report.html"
            if not path.is_file():
                raise missing(f"the run {run!r} has no report yet")
            return path.read_bytes()

        headers = {"Content-Security-Policy": _REPORT_POLICY, "Cache-Control": "no-cache"}
        return HTMLResponse(await self._read(request, read), headers=headers)

    async def section(self, request: Request, run: str, stage: str) -> dict[str, Any]:
        return await self._read(request, lambda runs: dict(_summary().section(named_run(runs, run), stage)))

    async def grown(self, request: Request, run: str, stage: str, what: str, after: str = "") -> dict[str, Any]:
        def read(runs: Path) -> dict[str, Any]:
            growing = _summary().GROWING
            if what not in growing:
                raise missing(f"a stage has {', '.join(growing)} and section, not {what!r}")
            state = _summary().stage_of(named_run(runs, run), stage)
            if state.folder is None:
                return {"status": state.status, "after": "", "restarted": bool(after), "records": []}
            return {"status": state.status, **_summary().grown(state.folder / growing[what], after)}

        return await self._read(request, read)

    async def compare(self, request: Request, run: str, other: str) -> dict[str, Any]:
        return await self._read(
            request, lambda runs: {"html": _summary().run_comparison(named_run(runs, run), named_run(runs, other))}
        )

    async def sweeps(self, request: Request) -> dict[str, Any]:
        return await self._read(request, lambda runs: {"sweeps": list(_summary().sweeps(runs / "sweeps"))})

    async def evaluations(self, request: Request) -> dict[str, Any]:
        return await self._read(request, lambda runs: {"evaluations": sorted(_summary().evaluations(runs))})

    async def compare_evaluations(self, request: Request, first: str, second: str) -> dict[str, Any]:
        return await self._read(request, lambda runs: {"html": _summary().evaluation_comparison(runs, first, second)})
