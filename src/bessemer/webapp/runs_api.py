"""What the page of runs asks: how far each has come, its curves as they grow, and two beside each other."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from bessemer.pipeline import run_names
from bessemer.webapp.access import missing, named_run, off_the_loop, shown_runs

#: The report's own file: it needs nothing but its styles, and whatever it held could reach nothing here.
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def _told() -> ModuleType:
    # what draws takes seconds to load, and a server that nobody asks for it starts without
    from bessemer.webapp import run_summary as run_told

    return run_told


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
        folder = shown_runs(request, self._runs)
        return {"runs": await off_the_loop(lambda: [_told().in_short(named_run(folder, name)) for name in run_names(folder)])}

    async def one(self, request: Request, run: str) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return dict(await off_the_loop(lambda: _told().at_length(named_run(folder, run))))

    async def figures(self, request: Request, run: str) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return {"figures": await off_the_loop(lambda: _told().figures(named_run(folder, run)))}

    async def report(self, request: Request, run: str) -> Response:
        folder = shown_runs(request, self._runs)

        def read() -> bytes:
            path = named_run(folder, run).folder / "report.html"
            if not path.is_file():
                raise missing(f"the run {run!r} has no report yet")
            return path.read_bytes()

        headers = {"Content-Security-Policy": _REPORT_POLICY, "Cache-Control": "no-cache"}
        return HTMLResponse(await off_the_loop(read), headers=headers)

    async def section(self, request: Request, run: str, stage: str) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return dict(await off_the_loop(lambda: _told().section(named_run(folder, run), stage)))

    async def grown(self, request: Request, run: str, stage: str, what: str, after: str = "") -> dict[str, Any]:
        folder = shown_runs(request, self._runs)

        def told() -> dict[str, Any]:
            growing = _told().GROWING
            if what not in growing:
                raise missing(f"a stage has {', '.join(growing)} and section, not {what!r}")
            state = _told().stage_of(named_run(folder, run), stage)
            if state.folder is None:
                return {"status": state.status, "after": "", "restarted": bool(after), "records": []}
            return {"status": state.status, **_told().grown(state.folder / growing[what], after)}

        return await off_the_loop(told)

    async def beside(self, request: Request, run: str, other: str) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return {"html": await off_the_loop(lambda: _told().beside(named_run(folder, run), named_run(folder, other)))}

    async def sweeps(self, request: Request) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return {"sweeps": await off_the_loop(lambda: list(_told().sweeps(folder / "sweeps")))}

    async def evaluations(self, request: Request) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return {"evaluations": await off_the_loop(lambda: sorted(_told().evaluations(folder)))}

    async def evaluations_beside(self, request: Request, first: str, second: str) -> dict[str, Any]:
        folder = shown_runs(request, self._runs)
        return {"html": await off_the_loop(lambda: _told().evaluations_beside(folder, first, second))}
