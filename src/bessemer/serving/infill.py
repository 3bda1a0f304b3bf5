"""llama.cpp's `/infill`, which editors' plug-ins call: the text at the cursor, from what stands before it, after it, and in
other files.

A prompt that is too long is cut to the context, farthest from the cursor first: other files, then the beginning of the text
before and the end of the text after it, of which three quarters and one quarter stay.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.async_generation import ChoiceChunk
from bessemer.inference.request import Completion
from bessemer.inference.request import Request as EngineRequest
from bessemer.inference.sampling.params import SamplingParams
from bessemer.serving.config import MESSAGES
from bessemer.serving.openai.protocol import Stops
from bessemer.serving.runtime.bodies import ApiError, Body, Name, read_body
from bessemer.serving.runtime.clients import Caller, caller_of
from bessemer.serving.runtime.served import Served, TextWork
from bessemer.serving.runtime.streams import Reply, respond
from bessemer.tokenization.prompts import infill_prompt
from bessemer.tokenization.tokenizer import Tokenizer

#: Control tokens before the name of a file, as code models spell them.
_FILE_SEPARATORS = ("<|file_sep|>", "<file_sep>")
#: Fields that llama.cpp's clients send and that change no token here: how it caches, how long it may take, in which order it
#: samples.
_WITHOUT_EFFECT = frozenset(
    {"cache_prompt", "id_slot", "samplers", "n_indent", "t_max_predict_ms", "t_max_prompt_ms", "timings_per_token"}
    | {"n_cache_reuse", "n_keep", "n_probs", "speculative.n_max", "speculative.n_min", "speculative.p_min"}
)
#: Share of the tokens for the text before the cursor, where both sides are too long.
_SHARE_BEFORE = 0.75
#: More characters than any token has.
_CHARACTERS_OF_A_TOKEN = 128
#: Where a request does not say.
_MOST_TOKENS = 128


class Extra(Body):
    """Another file, or a part of one."""

    text: str
    filename: str = ""
    time: float | int | None = None


class InfillRequest(Body):
    """The body of `/infill`. prompt: more of the text before the cursor, on its line. n_predict: 0 reads the prompt into the
    cache and answers nothing; -1: as many as the context holds. response_fields: those of the answer that are wanted, by their
    paths (`timings/prompt_n`)."""

    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] = Field(default_factory=list, max_length=MESSAGES.most)
    prompt: str = ""
    model: Name | None = None
    n_predict: int = Field(_MOST_TOKENS, ge=-1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    response_fields: list[str] = Field(default_factory=list, max_length=MESSAGES.most)

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}

    def sampling(self, own: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        """The engine's settings; own: the model's. Greedy where neither says how."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop")
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, [])}
        if given.get("seed", 0) < 0:
            del given["seed"]
        return SamplingParams(**{"temperature": 0.0, **own, **given, "max_tokens": max(1, max_tokens)})


def infill_tokens(tokenizer: Tokenizer, body: InfillRequest, limit: int) -> list[int]:
    """The prompt in at most `limit` tokens. Raises ConfigError for a tokenizer that lacks the control tokens, RequestError for
    a limit below what these need."""
    frame = infill_prompt(tokenizer, "", "")
    begin, control = frame[: len(tokenizer.begin_ids)], frame[len(tokenizer.begin_ids) :]
    if limit <= len(frame):
        raise RequestError(f"the model's context leaves {limit} tokens for the prompt, less than the control tokens need")
    # what is certainly too far from the cursor is not encoded
    most = limit * _CHARACTERS_OF_A_TOKEN
    before = tokenizer.encode((body.input_prefix + body.prompt)[-most:], add_bos=False)
    after = tokenizer.encode(body.input_suffix[:most], add_bos=False)
    left = limit - len(frame)
    if len(before) + len(after) > left:
        of_after = min(len(after), left - min(len(before), int(left * _SHARE_BEFORE)))
        before, after = before[len(before) - min(len(before), left - of_after) :], after[:of_after]
    left -= len(before) + len(after)
    files: list[int] = []
    for extra in reversed(body.input_extra):
        tokens = _file_tokens(tokenizer, extra)
        if len(tokens) > left:
            break
        files, left = tokens + files, left - len(tokens)
    prefix, suffix, middle = control
    return [*begin, *files, prefix, *before, suffix, *after, middle]


def _file_tokens(tokenizer: Tokenizer, extra: Extra) -> list[int]:
    text = f"{extra.filename}\n{extra.text}\n" if extra.filename else f"{extra.text}\n"
    separator = next((id for name in _FILE_SEPARATORS if (id := tokenizer.control_id(name)) is not None), None)
    return [*([] if separator is None else [separator]), *tokenizer.encode(text, add_bos=False)]


@dataclass
class InfillReply(Reply):
    """llama.cpp's answer: one object, or server-sent events of which the last has `stop: true`."""

    body: InfillRequest
    model: str
    request: EngineRequest
    _tokens: int = field(default=0, init=False)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (completion,) = completions
        self._tokens = completion.completion_tokens
        text = completion.text if self.body.n_predict else ""
        answer = {"content": text, **self._end(completion.finish_reason)}
        if not self.body.response_fields:
            return answer
        return {path: value for path in self.body.response_fields if (value := _at(answer, path)) is not None}

    def events(self, step: Iterable[ChoiceChunk]) -> str:
        events = []
        for _, chunk in step:
            self._tokens += len(chunk.token_ids)
            if chunk.text and self.body.n_predict:
                events.append({"content": chunk.text, "stop": False})
            if chunk.finish_reason is not None:
                events.append({"content": "", **self._end(chunk.finish_reason)})
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    def failed(self, error: ApiError) -> str:
        return f"data: {json.dumps(error.body())}\n\n"

    def _end(self, reason: str | None) -> dict[str, Any]:
        evaluated, predicted = self.request.prompt_tokens, self._tokens if self.body.n_predict else 0
        return {
            "stop": True,
            "stop_type": "limit" if reason == "length" else "eos",
            "model": self.model,
            "tokens_evaluated": evaluated,
            "tokens_predicted": predicted,
            "tokens_cached": self.request.cached_tokens,
            "truncated": False,
            "timings": {"prompt_n": evaluated - self.request.cached_tokens, "predicted_n": predicted},
        }


def _at(answer: Any, path: str) -> Any:
    """The value at a path of names with slashes; None where there is none."""
    for name in path.split("/"):
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer


@dataclass(frozen=True)
class InfillApi:
    """The route."""

    served: Served

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/infill", self.infill, methods=["POST"], response_model=None)
        return router

    async def infill(self, request: Request) -> Response:
        body = await read_body(InfillRequest, request)
        caller = caller_of(request)
        self.served.check_unguarded()
        name = body.model or self.served.names[0]
        served = await self.served.model_for(name, caller)
        with ExitStack() as admission:
            admission.enter_context(await served.worker.place(1, caller))
            work = await asyncio.to_thread(_prepared, served, body, name, caller)
            reply = InfillReply(body, name, work.request)
            return await respond(request, work, reply, admission, caller.headers, is_streamed=body.stream)


def _prepared(served: Served, body: InfillRequest, name: str, caller: Caller) -> TextWork:
    """Encode the prompt and check it, off the event loop."""
    engine = served.engine
    wanted = engine.longest // 4 if body.n_predict < 0 else max(1, body.n_predict)
    try:
        tokens = infill_tokens(engine.tokenizer, body, engine.longest - min(wanted, engine.longest - 1))
        most = served.most_tokens("n_predict", len(tokens), None if body.n_predict < 0 else wanted, caller)
        params = body.sampling(engine.sampling_settings, most)
        request = engine.prepare(tokens, params, adapter=served.adapter(name), cache_salt=caller.salt(None))
    except ConfigError as error:
        raise ApiError(str(error), status=501, code="unsupported") from None
    except RequestError as error:
        raise ApiError(str(error), code="invalid_value") from None
    return TextWork(served, caller, request, params)
