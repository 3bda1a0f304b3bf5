"""The page of `bessemer label`, on which people rank answers."""

from __future__ import annotations

import contextlib
import secrets
import webbrowser
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from markupsafe import Markup

from bessemer.posttraining.labelling import PAIRS, Labels, ranked_pairs
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.gate import Gate
from bessemer.serving.server import address_of, listen
from bessemer.webapp.access import templates

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
#: Most bytes that are read of a form.
_LONGEST_FORM = 10_000
#: Most digits of a rank.
_RANK_DIGITS = 4


def create_label_app(labels: Labels, folder: Path, hosts: Sequence[str] = ()) -> FastAPI:
    """An application with one page: the next prompt without a ranking, its answers, and a form for their ranks. hosts: as
    `ServingConfig.hosts`."""
    app = FastAPI(title="Bessemer", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, config=ServingConfig(hosts=list(hosts)), keys=None, error_body=lambda _, error: error.body())
    page = _Page(labels, folder)
    app.add_api_route("/", page.show, methods=["GET"])
    app.add_api_route("/", page.judge, methods=["POST"])
    return app


class _Page:
    def __init__(self, labels: Labels, folder: Path) -> None:
        self._labels = labels
        self._folder = folder
        #: Against forged forms: pages of other sites do not know it.
        self._token = secrets.token_urlsafe(16)
        #: The prompt whose judgement is being corrected; None: no correction.
        self._corrected: str | None = None
        self._template = templates().get_template("label.html.jinja")
        self._style = Markup(resources.files("bessemer.views").joinpath("style.css").read_text(encoding="utf-8"))

    async def show(self) -> HTMLResponse:
        return self._page()

    async def judge(self, request: Request) -> Response:
        body = await request.body()
        form = {name: values[-1] for name, values in parse_qs(body[:_LONGEST_FORM].decode("utf-8", "replace")).items()}
        if not secrets.compare_digest(form.get("token", "").encode(), self._token.encode()):
            return self._page("This form is of another page; judge the answers again.", status=403)
        id = form.get("id", "")
        if id not in self._labels.answers:
            return self._page("There is no such prompt.", status=400)
        if form.get("do") == "back":
            self._corrected = next(reversed(self._labels.rankings), None)
            return RedirectResponse("/", status_code=303)
        ranks: list[int] = []
        if form.get("do") != "skip":
            values = [form.get(f"rank{index}", "") for index in range(len(self._labels.answers[id].answers))]
            if not all(value.isdecimal() and len(value) <= _RANK_DIGITS for value in values):
                return self._page("Give every answer a rank, or skip the prompt.", status=400)
            ranks = [int(value) for value in values]
        try:
            self._labels.rank(id, ranks)
        except ValueError as error:
            return self._page(str(error), status=400)
        self._corrected = None
        return RedirectResponse("/", status_code=303)

    def _page(self, wrong: str = "", *, status: int = 200) -> HTMLResponse:
        labels, left = self._labels, self._labels.left
        item = labels.answers[self._corrected] if self._corrected is not None else next(iter(left), None)
        pairs = sum(
            len(ranked_pairs(labels.answers[id], ranking.ranks))
            for id, ranking in labels.rankings.items()
            if ranking.ranks and id in labels.answers
        )
        text = self._template.render(
            style=self._style,
            token=self._token,
            item=item,
            wrong=wrong,
            done=len(labels.answers) - len(left),
            total=len(labels.answers),
            pairs=pairs,
            before=bool(labels.rankings) and self._corrected is None,
            path=str(self._folder / PAIRS),
        )
        # with no-referrer, browsers send the page's own forms with `Origin: null`
        headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "same-origin", "Cache-Control": "no-store"}
        return HTMLResponse(text, status_code=status, headers=headers)


def serve_labels(
    labels: Labels,
    folder: Path,
    *,
    host: str,
    port: int,
    hosts: Sequence[str] = (),
    browser: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until interrupted. hosts: as for `create_label_app`. say: prints lines. Raises as `listen`."""
    with listen(host, port) as listener:
        app = create_label_app(labels, folder, hosts)
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
        url = address_of(listener)
        say(f"rank the answers at {url} · {len(labels.left):,} of {len(labels.answers):,} prompts are left · Ctrl-C stops")
        if browser:
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        say(f"{len(labels.rankings):,} prompts are judged; the pairs are in {folder / PAIRS}")
