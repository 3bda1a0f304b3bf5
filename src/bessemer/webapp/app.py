"""The pages: their HTML, scripts and styles, and the routes that they call."""

from __future__ import annotations

import hashlib
import json
import mimetypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from bessemer.core.policy import PolicyLines
from bessemer.serving.app import Pages, described
from bessemer.serving.runtime.served import Served
from bessemer.webapp.access import templates
from bessemer.webapp.change_api import ChangeApi
from bessemer.webapp.data_api import DataApi
from bessemer.webapp.feedback import FeedbackApi
from bessemer.webapp.forward_api import ForwardApi
from bessemer.webapp.lineage_api import LineageApi
from bessemer.webapp.model_copy import ModelCopy
from bessemer.webapp.pictures_api import PicturesApi
from bessemer.webapp.preference_runs import PreferenceRuns
from bessemer.webapp.runs_api import RunsApi
from bessemer.webapp.safety_api import SafetyApi
from bessemer.webapp.token_api import TokenApi
from bessemer.webapp.xray_api import XrayApi

if TYPE_CHECKING:
    from bessemer.serving.openapi import Operation

#: An example body for each route on the page of the API.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
    "/v1/completions": {"prompt": "The furnace", "max_tokens": 32},
    "/v1/embeddings": {"input": ["iron", "steel"]},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 64},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello"}]},
    "/api/chat": {"messages": [{"role": "user", "content": "Hello"}], "options": {"num_predict": 64}},
    "/api/generate": {"prompt": "The furnace", "options": {"num_predict": 32}},
    "/api/embed": {"input": ["iron", "steel"]},
    "/api/embeddings": {"prompt": "iron"},
    "/v1/vector_stores": {"name": "handbook", "file_ids": ["file-ID"]},
    "/v1/rerank": {"query": "what rusts?", "documents": ["Iron rusts.", "Gold does not."]},
    "/v1/score": {"text_1": "what rusts?", "text_2": ["Iron rusts.", "Gold does not."]},
    "/tokenize": {"prompt": "The furnace"},
    "/detokenize": {"tokens": [72, 105]},
    "/v1/load_lora_adapter": {"lora_name": "mine", "lora_path": "mine"},
    "/v1/unload_lora_adapter": {"lora_name": "mine"},
}


def operations_by_tag(document: Mapping[str, Any], model: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The operations of an OpenAPI document by tag, for the template. model: a served name, for the examples."""
    tags: dict[str, list[dict[str, Any]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tags.setdefault(operation["tags"][0], []).append(_shown(document, path, method, operation, model))
    return list(tags.items())


def _shown(document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any], model: str) -> dict[str, Any]:
    schema: Mapping[str, Any] = {}
    if "requestBody" in operation:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
    fields = schema.get("properties", {})
    command = f"curl {'-X DELETE ' if method == 'delete' else ''}ADDRESS{path}"
    if path in _EXAMPLES:
        body = ({"model": model} if "model" in fields else {}) | _EXAMPLES[path]
        command += f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    return {
        "id": operation["operationId"],
        "method": method.upper(),
        "path": path,
        "summary": operation["summary"],
        "fields": fields,
        "required": schema.get("required", []),
        "example": command,
    }


#: Content-Security-Policy: scripts and styles are files of this server, never inline.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Pages by path: template, title, script.
_PAGES = {
    "/": ("chat.html.jinja", "Chat", "chat.js"),
    "/xray": ("xray.html.jinja", "X-ray", "xray.js"),
    "/runs": ("runs.html.jinja", "Runs", "runs.js"),
    "/data": ("data.html.jinja", "Data", "data.js"),
    "/safety": ("safety.html.jinja", "Safety", "safety.js"),
    "/api": ("api.html.jinja", "API", "api.js"),
}
#: Media types that machines' own tables name otherwise, or lack.
_KINDS = {".js": "text/javascript", ".woff2": "font/woff2"}
#: Style sheets that the pages share with the report.
_VIEWS = ("style.css", "inspection.css")


@dataclass(frozen=True)
class WebSettings:
    """What the pages know besides the server.

    folder: of the model, where it has one. suggestions: questions that the chat offers. feedback: the folder for thumbs and
    edits; None: they stay in the browser. runs: the folder of the runs; None: none are shown. run: the one that made the model.
    makes_xrays: whether X-rays are offered, which load a second copy of the model. policy: lines of the file of the guard's
    policy. redteams: the folder of red teams' runs; None: none are shown.
    """

    folder: Path | None = None
    suggestions: list[str] = field(default_factory=list)
    feedback: Path | None = None
    runs: Path | None = None
    run: str | None = None
    makes_xrays: bool = True
    policy: PolicyLines | None = None
    redteams: Path | None = None


def operations() -> Mapping[tuple[str, str], Operation]:
    """The descriptions of the routes that the pages call."""
    from bessemer.webapp.operations import OPERATIONS

    return OPERATIONS


def public_paths() -> list[str]:
    """The pages and their files, which need no key."""
    return [*_PAGES, *_files()]


def web_pages(settings: WebSettings) -> Callable[[Served], Pages]:
    """The `pages` of `create_app`."""

    def pages(served: Served) -> Pages:
        site = _Site(served, settings)
        feedback = FeedbackApi(settings.feedback)
        copy = ModelCopy(served, settings.folder, settings.makes_xrays)
        apis = (
            TokenApi(served),
            PicturesApi(served),
            ForwardApi(served, copy),
            ChangeApi(served, copy),
            LineageApi(served, settings.runs, settings.run),
            XrayApi(served, copy),
            RunsApi(settings.runs),
            DataApi(served, settings.runs),
            feedback,
            PreferenceRuns(settings.folder, feedback, settings.runs),
            SafetyApi(served, settings.policy, settings.redteams),
        )
        return Pages([site.router(), *(api.router() for api in apis)], public_paths(), operations)

    return pages


@cache
def _files() -> dict[str, bytes]:
    """Scripts, styles and pictures by their paths."""
    static = resources.files("bessemer.webapp") / "static"
    own = {file.name: file.read_bytes() for file in static.iterdir() if file.is_file()}
    own |= {f"vendor/{file.name}": file.read_bytes() for file in (static / "vendor").iterdir()}
    shared = {f"report-{name}": (resources.files("bessemer.views") / name).read_bytes() for name in _VIEWS}
    return {f"/static/{name}": content for name, content in sorted((own | shared).items())}


class _Site:
    """The pages and their files, all in memory: no request opens a path."""

    def __init__(self, served: Served, settings: WebSettings) -> None:
        self._served = served
        self._settings = settings
        self.files = _files()
        self._etags = {path: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for path, content in self.files.items()}
        self._templates = templates()
        #: Rendered pages by path.
        self._pages: dict[str, str] = {}

    def _render(self, path: str) -> str:
        template, title, script = _PAGES[path]
        given = {
            "suggestions": self._settings.suggestions,
            "feedback": self._settings.feedback is not None,
            "run": self._settings.run,
            # whether a run of `preference` may be started on what was said
            "trains": None not in (self._settings.feedback, self._settings.runs, self._settings.folder),
            # the names under which this server has the model of the run
            "made": self._served.names_of_model,
            # whether a copy of it can be looked into and changed
            "inside": self._settings.makes_xrays and self._settings.folder is not None,
        }
        return self._templates.get_template(template).render(
            title=title,
            path=path,
            script=f"static/{script}",
            navigation=[(other, name) for other, (_, name, _) in _PAGES.items()],
            given=given,
            tags=operations_by_tag(described(operations), self._served.model_name) if path == "/api" else (),
        )

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        for path in _PAGES:
            router.add_api_route(path, self.page, methods=["GET", "HEAD"])
        for path in self.files:
            router.add_api_route(path, self.file, methods=["GET", "HEAD"])
        return router

    async def page(self, request: Request) -> HTMLResponse:
        path = request.scope["path"]
        if path not in self._pages:
            self._pages[path] = self._render(path)
        return HTMLResponse(
            self._pages[path],
            headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"},
        )

    async def file(self, request: Request) -> Response:
        path = request.scope["path"]
        headers = {"ETag": self._etags[path], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == self._etags[path]:
            return Response(status_code=304, headers=headers)
        kind = _KINDS.get(Path(path).suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"
        return Response(self.files[path], media_type=kind, headers=headers)
