"""The pages beside the API: their HTML, their scripts and styles, and what they ask about the model and the runs."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from bessemer.serving.app import Pages, described
from bessemer.serving.served import Served
from bessemer.webapp.api_page import operations_by_tag
from bessemer.webapp.data_api import DataApi
from bessemer.webapp.feedback import FeedbackApi
from bessemer.webapp.lineage_api import LineageApi
from bessemer.webapp.runs_api import RunsApi
from bessemer.webapp.token_api import TokenApi
from bessemer.webapp.xray_api import XrayApi

#: Scripts and styles come from this server alone, and there are none in the pages themselves.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
#: Pages by path: template, title, script.
_PAGES = {
    "/": ("chat.html.jinja", "Chat", "chat.js"),
    "/xray": ("xray.html.jinja", "X-ray", "xray.js"),
    "/runs": ("runs.html.jinja", "Runs", "runs.js"),
    "/data": ("data.html.jinja", "Data", "data.js"),
    "/api": ("api.html.jinja", "API", "api.js"),
}
#: Style sheets that the pages share with the report.
_VIEWS = ("style.css", "inspection.css")


@dataclass(frozen=True)
class WebSettings:
    """What the pages know beside the server.

    folder: of the model; None of one without. suggestions: questions that the chat offers. feedback: the folder that thumbs
    and edits are written to; None: they stay in the browser. runs: the folder of the runs that are shown; None: none are. run:
    the one of them that made the model. makes_xrays: whether sentences are X-rayed, with a second copy of the model.
    """

    folder: Path | None = None
    suggestions: list[str] = field(default_factory=list)
    feedback: Path | None = None
    runs: Path | None = None
    run: str | None = None
    makes_xrays: bool = True


def public_paths() -> list[str]:
    """The pages and their files, which need no key."""
    return [*_PAGES, *_files()]


def web_pages(settings: WebSettings) -> Callable[[Served], Pages]:
    """What `create_app` takes as its pages."""

    def pages(served: Served) -> Pages:
        site = _Site(served, settings)
        apis = (
            TokenApi(served),
            LineageApi(served, settings.runs, settings.run),
            XrayApi(served, settings.folder, settings.makes_xrays),
            RunsApi(settings.runs),
            DataApi(served, settings.runs),
            FeedbackApi(settings.feedback),
        )
        return Pages([site.router(), *(api.router() for api in apis)], public_paths())

    return pages


@cache
def _files() -> dict[str, bytes]:
    """Scripts, styles and pictures by their paths."""
    static = (resources.files("bessemer.webapp") / "static").iterdir()
    own = {file.name: file.read_bytes() for file in static if file.is_file()}
    shared = {f"report-{name}": (resources.files("bessemer.views") / name).read_bytes() for name in _VIEWS}
    return {f"/static/{name}": content for name, content in sorted((own | shared).items())}


class _Site:
    """The pages and their files, all in memory: a path is looked up, and never opened."""

    def __init__(self, served: Served, settings: WebSettings) -> None:
        self._served = served
        self._settings = settings
        self.files = _files()
        self._etags = {path: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for path, content in self.files.items()}
        environment = Environment(
            loader=PackageLoader("bessemer.webapp"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment = environment
        self._made: dict[str, str] = {}

    def _page(self, path: str) -> str:
        """A page, made when it is first asked for."""
        if path not in self._made:
            self._made[path] = self._rendered(path)
        return self._made[path]

    def _rendered(self, path: str) -> str:
        template, title, script = _PAGES[path]
        given = {
            "suggestions": self._settings.suggestions,
            "feedback": self._settings.feedback is not None,
            "run": self._settings.run,
            # the models that the run has made
            "made": self._served.names_of_model,
        }
        return self._environment.get_template(template).render(
            title=title,
            path=path,
            script=f"static/{script}",
            navigation=[(other, name) for other, (_, name, _) in _PAGES.items()],
            given=given,
            tags=operations_by_tag(described(), self._served.model_name) if path == "/api" else (),
        )

    def router(self) -> APIRouter:
        """The routes: one for every page and every file."""
        router = APIRouter(include_in_schema=False)
        for path in _PAGES:
            router.add_api_route(path, self.page, methods=["GET", "HEAD"])
        for path in self.files:
            router.add_api_route(path, self.file, methods=["GET", "HEAD"])
        return router

    async def page(self, request: Request) -> HTMLResponse:
        return HTMLResponse(
            self._page(request.scope["path"]),
            headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"},
        )

    async def file(self, request: Request) -> Response:
        path = request.scope["path"]
        headers = {"ETag": self._etags[path], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == self._etags[path]:
            return Response(status_code=304, headers=headers)
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return Response(self.files[path], media_type=kind, headers=headers)
