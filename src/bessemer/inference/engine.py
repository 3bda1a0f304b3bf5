"""The engine: prompts to completions with continuous batching over a paged KV cache, whole or as streams.

`tokens_per_second` measures the decoding speed of a model on this machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from bessemer.core.concurrency import FairLock
from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.async_generation import AsyncGeneration, StepDriver
from bessemer.inference.build import assemble, open_model
from bessemer.inference.capture import Capture
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.build import model_length, page_type, resolved_for
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.execution.weights import LoadedAdapters, WeightsStamp
from bessemer.inference.images import PicturePrompt, chat_prompt
from bessemer.inference.offline import (
    LogProbsMode,
    Reading,
    Rollouts,
    Sleep,
    WeightUpdates,
    collect_rollouts,
    params_of_prompts,
)
from bessemer.inference.request import (
    Chunk,
    Completion,
    Prompt,
    Prompts,
    Request,
    ScheduledRequest,
    as_prompts,
    check_streamed,
    completion_of,
    prompt_calls,
)
from bessemer.inference.request_builder import ContextShift, RequestBuilder
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.scores import Score, ScoreItem
from bessemer.inference.statistics import EngineStatistics
from bessemer.model.decoder import Decoder
from bessemer.model.storage.model_config import GENERATION_CONFIG
from bessemer.tokenization.chat import Message, Tool
from bessemer.tokenization.tokenizer import Tokenizer

__all__ = ["Capture", "Chunk", "Completion", "Engine", "EngineConfig", "Prompt", "SamplingParams", "Score", "ScoreItem"]


class Engine(AsyncGeneration, Reading, Sleep, WeightUpdates):
    """Generates text with a model.

    Calls from several threads, and streams that take turns on one, share one engine core: a thread that waits for tokens
    computes the next step for all, and lets the others take theirs after each. A stream that is closed early frees its
    blocks at once.

    A caller with a loop of its own, such as the server, works with requests: `prepare`, `begin`, `step` until the request is
    done, `drain` in between or `completion` at the end, and `stop` to leave it early.
    """

    def __init__(
        self,
        model: Path | str | Decoder | ShardedModel,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        config: EngineConfig | None = None,
        *,
        adapter: Path | str | None = None,
    ) -> None:
        """Open a model folder, a GGUF file or what `bessemer finetune` wrote; or use a model in memory, where it lies, with its
        tokenizer.

        adapter: folder of the default adapter, for requests that name none; None: that of the fine-tuning, where it has one.
        A `ShardedModel` is one that processes of a job share (`CollectiveEngine`).
        A model in memory may be trained on between calls: keys computed with other weights are not used again.
        Raises ArtefactError when the folder is damaged, ConfigError when the device is not on this machine or the memory
        holds no KV blocks.
        """
        self.config = config or EngineConfig()
        opened = open_model(model, tokenizer, device, self.config, adapter=adapter)
        self.model = opened.model
        kv_dtype = page_type(self.model, self.config)
        self.config = resolved_for(self.config, self.model.config, kv_dtype, self.model.device)
        self.tokenizer = opened.tokenizer
        #: Sampling settings in the model's folder, by the names of `SamplingParams`.
        self.sampling_settings: Mapping[str, Any] = opened.sampling_settings
        self._sharded = opened.sharded
        if self._sharded is not None:
            self._close = weakref.finalize(self, self._sharded.close)
        self._lock = FairLock()
        self._is_asleep = False
        self._driver = StepDriver(self)
        self._adapters = LoadedAdapters()
        context_name = "the model's context" if self.config.max_model_len is None else "max_model_len"
        self._builder = RequestBuilder(
            self.tokenizer,
            self.model.config,
            opened.end_tokens,
            self.context_length,
            context_name,
            shared=self._sharded is not None,
            watermark=self.config.watermark,
            pictures=opened.pictures,
        )
        self.core, self._cache_size = assemble(
            self.model,
            self.tokenizer,
            self.config,
            opened=opened.is_served,
            sharded=self._sharded,
            identity=opened.identity,
            pictures=opened.pictures,
        )
        if self.config.context_overflow == "shift":
            capacity = self.longest
            self._builder.shift = ContextShift(capacity, min(self.config.context_keep, capacity // 2))
        # last: packing takes the codes out of the model
        self._stamp = WeightsStamp(self.model)
        adapter = adapter or opened.adapter
        if adapter is not None:
            try:
                self._adapters.load_default(self._own_adapter(adapter))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the processes that share the model with this one, and finish what is being written to a prefix store."""
        if self.core.prefix_store is not None:
            self.core.prefix_store.close()
        if self._sharded is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def failure(self) -> BessemerError | None:
        """Why the engine can serve no more: one of the processes that share its model has ended. None while it can."""
        return None if self._sharded is None else self._sharded.workers.failure

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and completion together: `max_model_len`, or the model's context."""
        return model_length(self.model.config, self.config)

    @property
    def longest(self) -> int:
        """The most tokens of prompt and completion together that the KV cache holds, at most the context."""
        return self.core.scheduler.longest(self.context_length)

    @property
    def default_params(self) -> SamplingParams:
        """Parameters of a call that names none: the settings in the model's folder, over the defaults.

        Raises ConfigError where the model's file has an unknown setting.
        """
        return SamplingParams.parse(dict(self.sampling_settings), lambda path: ": ".join([GENERATION_CONFIG, *map(str, path)]))

    def describe(self) -> str:
        """One line about the KV cache: how many blocks, of which type, how much memory."""
        return self._cache_size

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times since the start, all of one moment. Waits for the end of the current step."""
        with self._lock:
            return self.core.statistics

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
        capture: Capture | None = None,
    ) -> list[Completion]:
        """Complete every prompt; a text begins with the begin token, token ids are taken as they are.

        A text, or token ids, alone are one prompt: the list has one completion. params (None: `default_params`), and the name
        of a loaded adapter (None: the model as it was opened): for all, or one for each. priority: lower is served
        first. cache_salt: only requests of the same salt share blocks of the prefix cache. capture: what `Completion.captured`
        is to hold. Raises RequestError for a prompt that fills the context, a request that can never be served, or an unknown
        adapter, before any is computed.
        """
        calls = prompt_calls(prompts, self.default_params if params is None else params, adapter)
        requests = [
            None
            if own.beam_width and capture is None
            else self.prepare(
                prompt, own, priority=priority, adapter=name, cache_salt=cache_salt, capture=capture, streams=False
            )
            for prompt, own, name in calls
        ]
        self._serve([request for request in requests if request is not None])
        return [
            self._beam_search(*call, priority, cache_salt) if request is None else completion_of(request, call.params)
            for request, call in zip(requests, calls, strict=True)
        ]

    def rollouts(
        self,
        prompts: Prompts,
        n: int,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        logprobs_mode: LogProbsMode = "temperature",
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Rollouts:
        """n samples of every prompt as tensors, which is what a policy is trained on. Each prompt is read once.

        logprobs_mode and n: override the parameters'. Raises RequestError as `generate`, and for best_of and beam_width.
        """
        if self.context_shift is not None:
            raise RequestError(
                "rollouts are trained on, so their texts are whole: take an engine with context_overflow: refuse"
            )
        prompts = as_prompts(prompts)
        each = params_of_prompts(params, len(prompts), n, logprobs_mode)
        requests = [
            self.prepare(prompt, one, priority=priority, adapter=adapter, cache_salt=cache_salt, streams=False)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        self._serve(requests)
        return collect_rollouts(requests)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Generator[Chunk, None, None]:
        """Complete a prompt token by token, by `default_params` where params is None; the last chunk carries the finish reason.

        The chunks' texts joined are `generate`'s. Raises RequestError at once for a prompt that does not fit, an unknown
        adapter, and for more than one completion.
        """
        params = self.default_params if params is None else params
        check_streamed(params)
        return self._stream(self.prepare(prompt, params, priority=priority, adapter=adapter, cache_salt=cache_salt))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Completion:
        """The assistant's answer to a conversation; with tools it may be a call of one, as the chat template writes it.

        A content of parts may hold pictures: `{"type": "image", "image": …}`, a `Picture`, a path or a file's bytes. Raises
        RequestError as `generate`, and for a malformed message, picture or tool.
        """
        prompt = chat_prompt(self.tokenizer, messages, tools)
        return self.generate([prompt], params, adapter=adapter, cache_salt=cache_salt)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Generator[Chunk, None, None]:
        """The assistant's answer token by token. Raises RequestError at once, as `chat`."""
        prompt = chat_prompt(self.tokenizer, messages, tools)
        return self.stream(prompt, params, adapter=adapter, cache_salt=cache_salt)

    # -- for a caller with a loop of its own

    @property
    def max_num_seqs(self) -> int:
        """Sequences that are computed at once; more wait for a place."""
        return self.config.max_num_seqs

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
        capture: Capture | None = None,
        streams: bool = True,
    ) -> Request:
        """A request that has not begun, with the others of the same prompt as its `siblings`. Any thread may ask for it.

        streams: False where the caller waits for the end: it then has one chunk.
        Raises RequestError for whatever is known to be wrong before anything is computed.
        """
        loaded = self._adapters.of(adapter)
        least = min(1, params.max_tokens)
        if isinstance(prompt, PicturePrompt):
            ids, spans = self._builder.picture_prompt(prompt, least)
        else:
            shifts = self._builder.may_shift(params, capture)
            ids, spans = self._builder.prompt_ids(prompt, least=least, shifts=shifts), ()
        request = self._builder.request(ids, params, priority, loaded, cache_salt, capture, streams=streams, spans=spans)
        self.core.scheduler.check(request.sequence.limit)
        return request

    def begin(self, request: ScheduledRequest) -> None:
        """Let a request take part in the steps. Raises RequestError when too many wait already, and while the engine sleeps."""
        with self._lock:
            if self._is_asleep:
                raise RequestError("the engine sleeps, and its cache is free: wake it first")
            self._notice_changes(request)
            self.core.enqueue_request(request)

    def step(self) -> None:
        """Compute the next step of all in-flight requests."""
        with self._lock:
            if self.core.busy:
                self.core.step()

    def stop(self, request: Request) -> None:
        """End a request and its siblings, in any state; their blocks are free at once."""
        with self._lock:
            self.core.abort(request)

    def completion(self, request: Request, params: SamplingParams) -> Completion:
        """The completion of a request that is done, as `completion_of`."""
        return completion_of(request, params)

    # -- inside

    def _beam_search(
        self, prompt: Prompt, params: SamplingParams, adapter: str | None, priority: int, cache_salt: str | None
    ) -> Completion:
        """The best completions by beam search. Each step requests logits: the beams share prefixes with the step before."""
        loaded = self._adapters.of(adapter)
        ids = self._builder.prompt_ids(prompt)
        search = self._builder.beam_search(ids, params)
        self.core.scheduler.check(len(ids) + search.limit)
        while not search.finished:
            requests = [self._builder.logits_request(tokens, priority, loaded, cache_salt) for tokens in search.sequences]
            self._serve(requests)
            search.advance(torch.stack([request.logits_V for request in requests if request.logits_V is not None]))
        return self._builder.beam_completion(search, len(ids))

    def _serve(self, requests: Sequence[ScheduledRequest]) -> None:
        """Begin these requests at once, and step until all are done. Raises the first error that one of them has."""
        waited_for = [each for request in requests for each in (request, *request.siblings)]
        try:
            with self._lock:
                for request in requests:
                    self.begin(request)
            # another thread may step in between, or have taken the last step
            for request in waited_for:
                while not request.done:
                    with self._lock:
                        if not request.done:
                            self.core.step()
            for request in waited_for:
                if request.error is not None:
                    raise request.error
        except BaseException:
            with self._lock:
                for request in requests:
                    self.core.abort(request)
            raise

    def _stream(self, request: Request) -> Generator[Chunk, None, None]:
        self.begin(request)
        try:
            while True:
                with self._lock:
                    if not request.chunks and not request.done:
                        self.core.step()
                    chunks = request.drain()
                yield from chunks
                if request.finish_reason is not None and not request.chunks:
                    return
        finally:
            with self._lock:
                self.core.abort(request)
