"""Where a token comes from: predictions of the run's earlier models, and training documents with the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from fastapi import APIRouter, Request
from pydantic import Field

from bessemer.core.errors import BessemerError
from bessemer.data.corpus.reader import TRAIN
from bessemer.data.corpus.search import Passage, passages
from bessemer.inspection.inspect import piece_of
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import read_decoder_config
from bessemer.posttraining.data.search import ExamplePassage, example_passages
from bessemer.serving.runtime.bodies import ApiError, Body, read_body, without_places
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.streams import EventStream, server_sent_event
from bessemer.webapp.access import check_owner, missing, named_run, off_the_loop
from bessemer.webapp.origins import described_example, example_files, last_documents, origins_of
from bessemer.webapp.token_api import TokenId, check_without_pictures

if TYPE_CHECKING:
    from bessemer.pipeline.run_folder import RunFolder

#: Likeliest tokens of a model, and checkpoints of a stage besides its final model.
_LIKELIEST, _CHECKPOINTS = 3, 6
#: Most tokens of context for an earlier model.
_LONGEST = 2048
#: Tokens of the longest and the shortest n-gram that is searched for; its last token is the chosen one.
_LONGEST_NGRAM, _SHORTEST_NGRAM = 12, 2


class EarlierRequest(Body):
    """A token with those before it. model: which generated it; None: the first model."""

    model: str | None = None
    before: Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
    token: TokenId


class GrowthRequest(Body):
    """An answer's tokens with those before them. model: as of `EarlierRequest`."""

    model: str | None = None
    before: Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
    ids: Annotated[list[TokenId], Field(min_length=1, max_length=_LONGEST)]


@dataclass(frozen=True)
class _Earlier:
    """A model of the run: the final one of a stage, or a checkpoint at a step."""

    stage: str
    folder: Path
    step: int | None = None


class LineageApi:
    """The routes. runs: the folder of the runs; run: the one that made the served model. None: unknown, or not shown."""

    def __init__(self, served: Served, runs: Path | None, run: str | None) -> None:
        self._served = served
        self._made_by = None if runs is None or run is None else (runs, run)
        # one model at a time, and waiting takes no thread
        self._lock = asyncio.Lock()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/inspect")
        router.add_api_route("/earlier", self.earlier, methods=["POST"])
        router.add_api_route("/growth", self.growth, methods=["POST"], response_model=None)
        router.add_api_route("/training", self.training, methods=["POST"])
        router.add_api_route("/origins", self.origins, methods=["POST"])
        return router

    async def earlier(self, request: Request) -> dict[str, Any]:
        self._served.check_unguarded()
        body = await read_body(EarlierRequest, request)
        self._check(request, body.model, [*body.before, body.token])
        check_without_pictures(self._served.engine, body.before)
        caller_of(request).spend(prompt=min(len(body.before), _LONGEST))

        with self._served.worker.admit(1):
            async with self._lock:
                return {"models": await off_the_loop(lambda: [self._prediction(model, body) for model in self._models])}

    async def growth(self, request: Request) -> EventStream:
        """How likely each token of an answer was to every model of the run, as events, the oldest model first."""
        self._served.check_unguarded()
        body = await read_body(GrowthRequest, request)
        self._check(request, body.model, [*body.before, *body.ids])
        check_without_pictures(self._served.engine, body.before)
        caller_of(request).spend(prompt=min(len(body.before) + len(body.ids), _LONGEST))
        models = await off_the_loop(lambda: self._models)
        events = self._growth_events(models, body)
        # refuses what is wrong before the response begins
        await anext(events)
        return EventStream(events)

    async def _growth_events(self, models: list[_Earlier], body: GrowthRequest) -> AsyncGenerator[str, None]:
        with self._served.worker.admit(1):
            yield ""
            async with self._lock:
                for number, earlier in enumerate(models, start=1):
                    found = await asyncio.to_thread(self._grown, earlier, body)
                    yield server_sent_event({**found, "progress": number / len(models)})

    async def training(self, request: Request) -> dict[str, Any]:
        body = await read_body(EarlierRequest, request)
        self._check(request, body.model, [*body.before, body.token])
        tokenizer = self._served.engine.tokenizer
        ids = [*body.before[-(_LONGEST_NGRAM - 1) :], body.token]
        needles = [
            text
            for start in range(len(ids) - _SHORTEST_NGRAM + 1)
            if (text := tokenizer.decode(ids[start:])).strip() and "\ufffd" not in text
        ]

        def search() -> dict[str, Any]:
            run = self._run
            stage, folder = last_documents(run)
            files = list(example_files(run))
            if folder is None and not files:
                raise missing(f"the run {run.name!r} has neither documents nor examples")
            places: list[Passage] = []
            examples: list[ExamplePassage] = []
            looked_at = documents = rows = 0
            if needles and folder is not None:
                places, looked_at, documents = passages(folder / "documents", needles, split=TRAIN)
            if needles:
                examples, rows = example_passages(files, needles)
            return {
                "run": run.name,
                "stage": stage,
                "passages": [_described(passage) for passage in places],
                "looked_at": looked_at,
                "documents": documents,
                "examples": [described_example(passage) for passage in examples],
                "rows": rows,
                "example_stages": list(dict.fromkeys(file.stage for file in files)),
            }

        return await off_the_loop(search)

    async def origins(self, request: Request) -> dict[str, Any]:
        """The spans of an answer that stand in the training data, each with some of the places, and the filters' verdict."""
        body = await read_body(GrowthRequest, request)
        self._check(request, body.model, [*body.before, *body.ids])
        text = self._served.engine.tokenizer.decode(body.ids)
        return await off_the_loop(lambda: origins_of(self._run, text))

    def _check(self, request: Request, model: str | None, tokens: Sequence[int]) -> None:
        """Raises ApiError: 403 for a client that may not see runs, 404 for an adapter or an additional model, whose run is
        unknown, 400 for tokens that there are not."""
        check_owner(request)
        if self._made_by is None or model not in (None, *self._served.names_of_model):
            raise missing("the run that made this model is not known here; serve it first, by the run's name")
        if max(tokens) >= self._served.engine.tokenizer.vocab_size:
            raise ApiError("token ids are below the size of the vocabulary", parameter="token", code="invalid_value")

    @cached_property
    def _run(self) -> RunFolder:
        assert self._made_by is not None, "`_body` checks it"
        return named_run(*self._made_by)

    @cached_property
    def _models(self) -> list[_Earlier]:
        return [model for name, folder in self._run.stages().items() for model in _models_of(name, folder)]

    def _prediction(self, earlier: _Earlier, body: EarlierRequest) -> dict[str, Any]:
        prediction: dict[str, Any] = {"stage": earlier.stage, "step": earlier.step}
        try:
            model = _opened(earlier)
        except BessemerError as error:
            return {**prediction, "problem": without_places(str(error))}
        tokens = body.before[-min(_LONGEST, model.config.max_position_embeddings) :]
        if max(*tokens, body.token) >= model.config.vocab_size:
            return {**prediction, "problem": "it has another vocabulary"}
        with torch.inference_mode():
            share_V = model.float().eval()(torch.tensor([tokens]))[0, -1].softmax(-1)
        best = share_V.topk(min(_LIKELIEST, len(share_V)))
        tokenizer = self._served.engine.tokenizer
        likeliest = [
            {"piece": piece_of(tokenizer, id), "probability": probability}
            for id, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if id < tokenizer.vocab_size
        ]
        rank = int((share_V > share_V[body.token]).sum()) + 1
        return {**prediction, "likeliest": likeliest, "probability": float(share_V[body.token]), "rank": rank}

    @torch.inference_mode()
    def _grown(self, earlier: _Earlier, body: GrowthRequest) -> dict[str, Any]:
        """A model's probability of each token of an answer; None for those before which it can read nothing."""
        grown: dict[str, Any] = {"stage": earlier.stage, "step": earlier.step}
        try:
            model = _opened(earlier)
        except BessemerError as error:
            return {**grown, "problem": without_places(str(error))}
        read = [*body.before, *body.ids][-min(_LONGEST, model.config.max_position_embeddings) :]
        if max(read) >= model.config.vocab_size:
            return {**grown, "problem": "it has another vocabulary"}
        count = min(len(body.ids), len(read) - 1)
        share_TV = model.float().eval()(torch.tensor([read]))[0, -count - 1 : -1].softmax(-1)
        shares = share_TV.gather(1, torch.tensor(read[-count:])[:, None])[:, 0].tolist()
        return {**grown, "probabilities": [*[None] * (len(body.ids) - count), *shares]}


def _opened(earlier: _Earlier) -> Decoder:
    """Raises BessemerError for a damaged model."""
    return load_model(earlier.folder) if earlier.step is None else _of_checkpoint(earlier.folder)


def _models_of(stage: str, folder: Path) -> Iterator[_Earlier]:
    """The models of a stage, oldest first: some of its checkpoints, and its final model."""
    model = folder / "model"
    if not (model / "config.json").is_file() or not _writes_text(model):
        return
    from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_of_step, step_of, steps_of

    steps = steps_of(folder / CHECKPOINTS)[:-1]
    chosen = steps[:: max(1, -(-len(steps) // _CHECKPOINTS))]
    for step in chosen:
        checkpoint = checkpoint_of_step(folder / CHECKPOINTS, step)
        yield _Earlier(stage, checkpoint, step_of(checkpoint))
    yield _Earlier(stage, model)


def _of_checkpoint(checkpoint: Path) -> Decoder:
    # loads the trainer: not when the server starts
    from bessemer.training.checkpoint.export import checkpoint_model

    return checkpoint_model(checkpoint)[0]


def _writes_text(model: Path) -> bool:
    """Whether it is a language model, not a reward model."""
    return not read_decoder_config(model).num_scores


def _described(passage: Passage) -> dict[str, Any]:
    row = passage.row
    return {
        "id": row["id"],
        "source": row["source"],
        "url": row["url"],
        "left": passage.left,
        "found": passage.found,
        "right": passage.right,
        "scores": {name: value for name, value in row.items() if isinstance(value, int | float) and abs(value) < float("inf")},
    }
