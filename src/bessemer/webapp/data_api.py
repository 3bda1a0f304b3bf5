"""Routes of the page of data: a run's kept and rejected documents, duplicates, and the history of one document."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from bessemer.core.environment import install_advice
from bessemer.core.errors import ConfigError
from bessemer.data.corpus.reader import SIDES, history, is_document_id
from bessemer.data.corpus.search import Query, SearchResult, duplicate_groups, facets, ranked, search, sides_of
from bessemer.serving.runtime.bodies import without_places
from bessemer.serving.runtime.served import Served
from bessemer.tokenization.measure import shown_tokens
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.webapp.access import missing, module_of, named_run, off_the_loop, shown_runs

if TYPE_CHECKING:
    from bessemer.data.stages.explain import Explanation
    from bessemer.pipeline.run_folder import RunFolder

#: Most rows, sources or rules in a response.
_MOST = 100
#: Most characters of a text that are shown and explained, and that are shown as tokens.
_LONGEST, _IN_TOKENS = 200_000, 20_000


class DataApi:
    """The routes. runs: the folder of the runs; None: none are shown."""

    def __init__(self, served: Served, runs: Path | None) -> None:
        self._served = served
        self._runs = runs
        # explanations use all cores: one at a time, and waiting takes no thread
        self._explaining = asyncio.Lock()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect/documents")
        for path, answer in (
            ("/{run}", self.folders),
            ("/{run}/{stage}/{side}", self.search),
            ("/{run}/{stage}/{side}/facets", self.facets),
            ("/{run}/{stage}/{side}/duplicates", self.duplicates),
        ):
            router.add_api_route(path, answer, methods=["GET"], response_model=None)
        router.add_api_route("/{run}/{identity}", self.document, methods=["GET"], response_model=None)
        return router

    async def folders(self, request: Request, run: str) -> dict[str, Any]:
        run_folder = self._run(request, run)

        def counted() -> list[dict[str, Any]]:
            stages = ((name, dict(sides_of(folder, SIDES))) for name, folder in run_folder.stages().items())
            return [{"stage": name, **sides} for name, sides in stages if sides]

        return {"folders": await off_the_loop(counted)}

    async def search(
        self,
        request: Request,
        run: str,
        stage: str,
        side: str,
        text: str = "",
        source: str = "",
        split: str = "",
        rule: str = "",
        column: str = "",
        low: float | None = None,
        high: float | None = None,
        order: str = "",
        descending: bool = False,
        start: int = 0,
        limit: int = 25,
    ) -> dict[str, Any]:
        folder = self._documents(request, run, stage, side)
        query = Query(text, source, split, rule, column, low, high)
        start, limit = max(0, start), max(1, min(limit, _MOST))

        def results() -> SearchResult:
            if order:
                return ranked(folder, query, order, descending=descending, start=start, limit=limit)
            return search(folder, query, start=start, limit=limit)

        found = await off_the_loop(results)
        rows = [_finite(row | {"metadata": dict(row["metadata"] or [])}) for row in found.rows]
        return {"rows": rows, "next": found.next, "looked_at": found.looked_at, "documents": found.documents}

    async def facets(self, request: Request, run: str, stage: str, side: str) -> dict[str, Any]:
        folder = self._documents(request, run, stage, side)
        counts = await off_the_loop(lambda: facets(folder))
        return {
            "sources": counts.sources.most_common(_MOST),
            "splits": counts.splits.most_common(),
            "rules": counts.rules.most_common(_MOST),
            "scores": counts.scores,
            "is_whole": counts.is_whole,
        }

    async def duplicates(self, request: Request, run: str, stage: str, side: str) -> dict[str, Any]:
        folder = self._documents(request, run, stage, side)
        if side != "rejected":
            raise missing("duplicates are among the documents that were dropped")
        groups = await off_the_loop(lambda: duplicate_groups(folder))
        return {
            "groups": [
                {"survivor": survivor, "members": count, "some": [asdict(member) for member in members]}
                for survivor, count, members in groups
            ]
        }

    async def document(self, request: Request, run: str, identity: str) -> dict[str, Any]:
        run_folder = self._run(request, run)
        if not is_document_id(identity):
            raise missing("a document's id has 32 hexadecimal digits")
        async with self._explaining:
            return await off_the_loop(lambda: self._described(run_folder, identity))

    def _described(self, run: RunFolder, identity: str) -> dict[str, Any]:
        stages = run.stages()
        sightings = list(history(stages.items(), identity))
        if not sightings:
            raise missing(f"the run {run.name!r} has no document {identity}")
        first, last = sightings[0].row, sightings[-1].row
        text = first["text"][:_LONGEST]
        problem, explanation = None, None
        try:
            explanation = explained(run, text, first["url"])
        except ConfigError as error:
            problem = without_places(str(error))
        except ModuleNotFoundError as error:
            problem = install_advice(module_of(error))
        tokenizer = self._tokenizer(run)
        return {
            "id": identity,
            **{name: last[name] for name in ("source", "url", "language", "license", "split")},
            "metadata": dict(last["metadata"] or []),
            "text": last["text"][:_LONGEST],
            "characters": len(last["text"]),
            "history": [
                {
                    "stage": sighting.stage,
                    "side": sighting.side,
                    "reason": sighting.row.get("reason"),
                    "bytes": len(sighting.row["text"].encode()),
                }
                for sighting in sightings
            ],
            "explanation": None if explanation is None else _finite(asdict(explanation) | {"text": ""}),
            "problem": problem,
            "tokens": shown_tokens(tokenizer, last["text"][:_IN_TOKENS]),
        }

    def _tokenizer(self, run: RunFolder) -> Tokenizer:
        """The tokenizer of the run; that of the served model where the run has none."""
        for stage in run.stages().values():
            for folder in (stage / "tokenizer", stage / "model"):
                if (folder / "tokenizer.json").is_file():
                    return load_tokenizer(folder)
        return self._served.engine.tokenizer

    def _run(self, request: Request, name: str) -> RunFolder:
        return named_run(shown_runs(request, self._runs), name)

    def _documents(self, request: Request, run: str, stage: str, side: str) -> Path:
        folder = self._run(request, run).stages().get(stage)
        if folder is None or side not in SIDES:
            raise missing(f"the run {run!r} has no {side} of a stage {stage!r}")
        return folder / side


def explained(run: RunFolder, text: str, url: str | None) -> Explanation:
    """Scores and limits of a text as the run's cleaning has them.

    Raises ConfigError for settings that cannot be asked any more, ModuleNotFoundError for an extra that is missing.
    """
    # loads compiled filters: not when the server starts
    from bessemer.data.stages.explain import explain, explain_with
    from bessemer.pipeline.recipe_settings import recorded_cleaning
    from bessemer.pipeline.stages import open_language_model

    clean, select, folder = recorded_cleaning(run)
    if clean is None and select is None:
        return explain(text, url=url)
    return explain_with(text, clean, select, folder, url=url, open_model=open_language_model)


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
