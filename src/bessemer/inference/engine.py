"""The engine: prompts to completions over pages of keys and values, many at once, whole or as streams."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bessemer.core.errors import BessemerError, ConfigError, RequestError
from bessemer.core.fair_lock import FairLock
from bessemer.inference.adapters import LoadedAdapter, LoadedAdapters
from bessemer.inference.build import assemble
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.kv_memory import model_length
from bessemer.inference.execution.weights_stamp import WeightsStamp
from bessemer.inference.loading import open_model
from bessemer.inference.request import Chunk, Completion, Request
from bessemer.inference.sampling.beam_search import beam_search
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import SamplingState
from bessemer.inference.sampling.stop_strings import AnswerText
from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.inference.speculation.proposer import Speculated
from bessemer.model.adapter_folder import read_adapter
from bessemer.model.decoder import Decoder
from bessemer.tokenization.chat import Message, Tool
from bessemer.tokenization.tokenizer import Tokenizer

__all__ = ["Chunk", "Completion", "Engine", "EngineConfig", "Prompt", "SamplingParams"]

Prompt = str | Sequence[int]


class Engine:
    """Generates text with a model.

    Calls from several threads, and streams that take turns on one, share one loop: a thread that waits for tokens computes the
    next step for all, and lets the others take theirs after each. A stream that is closed early frees its pages at once.

    Who has a loop of its own, as the server does, works with answers: `prepare`, `begin`, `step` until it is done, `drain` in
    between or `completion` at the end, and `stop` to leave it early.
    """

    def __init__(
        self,
        model: Path | str | Decoder,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        config: EngineConfig | None = None,
    ) -> None:
        """Open a model folder or a GGUF file, or use a model in memory, where it lies, with its tokenizer.

        A model in memory may be trained on between calls: what was read with other weights is not used again.
        Raises ArtefactError when the folder is damaged, ConfigError when the device is not on this machine or the memory
        holds no pages.
        """
        self.config = config or EngineConfig()
        opened = open_model(model, tokenizer, device, self.config)
        self.model, self.tokenizer, self._end_tokens, is_served, self._sharded = opened
        if self._sharded is not None:
            self._close = weakref.finalize(self, self._sharded.close)
        self._lock = FairLock()
        self._names = count()
        self._adapters = LoadedAdapters()
        self._grammars = GrammarCompiler(self.tokenizer, self.model.config.vocab_size, self._end_tokens)
        self.core, self._pages = assemble(self.model, self.tokenizer, self.config, opened=is_served, sharded=self._sharded)
        self._stamp = WeightsStamp(self.model)  # after those that pack the codes have taken them

    def close(self) -> None:
        """End the processes that share the model with this one. An engine of one process has nothing to end."""
        if self._sharded is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def failure(self) -> BessemerError | None:
        """Why the engine can answer no more: of the processes that share its model, one has ended. None while it can."""
        return None if self._sharded is None else self._sharded.workers.failure

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together: `max_model_len`, or the model's context."""
        return model_length(self.model.config, self.config)

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer together that the pages hold, at most the context."""
        return self.core.scheduler.longest(self.context_length)

    def describe(self) -> str:
        """One line about the pages: how many, of which type, how much memory."""
        return self._pages

    @property
    def arithmetic(self) -> str:
        """One line about how it computes on this machine: compiled kernels or PyTorch, in which types."""
        return f"computed by {self.core.executor.arithmetic}"

    @property
    def speculated(self) -> Speculated:
        """What guessing ahead has come to since the start."""
        return Speculated(self.core.guessed, self.core.right, self.core.steps)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[Completion]:
        """Complete every prompt; a text begins with the begin token, token ids are taken as they are.

        params, and the name of a loaded adapter (None: the model as it is): for all, or one for each. priority: lower is served
        first. cache_salt: only requests of the same salt share pages of the prefix cache. Raises RequestError for a prompt that
        leaves no room in the context, a request that can never be served, or an unknown adapter, before any is computed.
        """
        each, adapters = _for_each(prompts, params, "params"), _for_each(prompts, adapter, "adapters")
        if any(one.beam_width for one in each):
            return [
                self._likeliest(prompt, one, priority, name, cache_salt)
                if one.beam_width
                else self.generate([prompt], one, priority=priority, adapter=name, cache_salt=cache_salt)[0]
                for prompt, one, name in zip(prompts, each, adapters, strict=True)
            ]
        requests = [
            self.prepare(prompt, one, priority=priority, adapter=name, cache_salt=cache_salt)
            for prompt, one, name in zip(prompts, each, adapters, strict=True)
        ]
        return self._completions(requests, each)

    def _completions(self, requests: list[Request], each: Sequence[SamplingParams]) -> list[Completion]:
        try:
            with self._lock:
                self._begin(requests)
            self._finish(requests)
        except BaseException:
            with self._lock:
                for request in requests:
                    self.core.abort(request)
            raise
        return [self.completion(request, one) for request, one in zip(requests, each, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Generator[Chunk, None, None]:
        """Complete a prompt token by token; the last chunk carries the finish reason.

        The chunks' texts joined are `generate`'s. Raises RequestError at once for a prompt that does not fit, an unknown
        adapter, and for more than one answer.
        """
        if (params.best_of or params.n) > 1 or params.beam_width:
            raise RequestError("a stream is one answer as it is made: leave out n, best_of and beam_width, or do not stream")
        return self._stream(self.prepare(prompt, params, priority=priority, adapter=adapter, cache_salt=cache_salt))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: Sequence[Tool] | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Completion:
        """The assistant's answer to a conversation; with tools it may be a call of one, as the chat template writes it.

        Raises RequestError as `generate`, and for a malformed message or tool.
        """
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
        return self.generate([prompt], params, adapter=adapter, cache_salt=cache_salt)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: Sequence[Tool] | None = None,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Generator[Chunk, None, None]:
        """The assistant's answer token by token. Raises RequestError at once, as `chat`."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
        return self.stream(prompt, params, adapter=adapter, cache_salt=cache_salt)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: Path | str) -> None:
        """Let requests name the adapter in a folder. One of the same name is replaced.

        Answers under way go on with the adapter that they began with. Raises ArtefactError for a folder that holds none, or
        one that was made for another model.
        """
        if self._sharded is not None:
            raise ConfigError("parallel: adapters are not cut; serve them with a model that is in one process")
        adapter = read_adapter(folder, self.model)
        with self._lock:
            self._adapters.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter. Answers under way go on with it, and its memory is free when they have ended.

        Raises RequestError for a name that is not loaded.
        """
        with self._lock:
            self._adapters.unload(name)

    def update_weights(self, weights: dict[str, Tensor] | None = None) -> None:
        """Take other weights, by the names of the model's `state_dict`; None: those that were changed in place.

        Answers under way go on with them, and read again what they had read. Raises RequestError for a name or a shape that
        the model does not have, and changes nothing then.
        """
        if self._sharded is not None:
            raise ConfigError("parallel: every process reads the weights from the model's folder; open it again for others")
        with self._lock:
            if weights is not None:
                self._replace(weights)
            self._forget()

    # -- for who has a loop of its own

    @property
    def max_num_seqs(self) -> int:
        """Answers that are computed at once; more wait for a place."""
        return self.config.max_num_seqs

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """An answer that has not begun, with the others to the same prompt as its `siblings`. Any thread may ask for it.

        Raises RequestError for whatever can be known to be wrong before anything is computed.
        """
        loaded = None if adapter is None else self._adapters.find(adapter)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        if not all(0 <= id < self.model.config.vocab_size for id in ids):
            raise RequestError(f"the prompt has a token id outside the vocabulary of {self.model.config.vocab_size:,} tokens")
        room = self.context_length - len(ids)
        if room < 1:
            limit_of = "the model's context" if self.config.max_model_len is None else "max_model_len"
            raise RequestError(
                f"the prompt has {len(ids):,} tokens and {limit_of} is {self.context_length:,}, answer included; "
                "shorten the prompt"
            )
        limit = len(ids) + min(params.max_tokens, room)
        ends = frozenset() if params.ignore_eos else self._end_tokens
        # what is found in pages has no logits: a prompt whose log-probabilities are wanted is shared with nobody else's
        alone = None if params.prompt_logprobs is None else f"alone {next(self._names)}"
        salt = alone or _salt(loaded, cache_salt)
        first, *others = (
            self._one(ids, params, limit, ends, index, priority, salt, loaded) for index in range(params.best_of or params.n)
        )
        first.siblings = others
        self.core.check(first)
        return first

    def begin(self, request: Request) -> None:
        """Let an answer take part in the steps. Raises RequestError when too many wait already."""
        with self._lock:
            self._begin([request])

    def step(self) -> None:
        """Compute the next step of every answer under way."""
        with self._lock:
            if self.core.busy:
                self.core.step()

    def stop(self, request: Request) -> None:
        """End an answer and those beside it, in any state; their pages are free at once."""
        with self._lock:
            self.core.abort(request)

    def completion(self, request: Request, params: SamplingParams) -> Completion:
        """An answer that is done, with those beside it, as `params` asked for it: of more than n answers the likeliest.

        Raises the answer's error when there is one. Its chunks are taken.
        """
        made = [_whole(each) for each in (request, *request.siblings)]
        if len(made) > params.n:
            made = sorted(made, key=_mean_log_prob, reverse=True)[: params.n]
        if params.logprobs is None:
            made = [replace(each, log_probs=None) for each in made]
        prompt = request.prompt_log_probs if params.prompt_logprobs is not None else None
        return replace(made[0], prompt_log_probs=prompt, others=tuple(made[1:]), cached_tokens=request.sequence.cached)

    # -- inside

    def _one(
        self,
        ids: list[int],
        params: SamplingParams,
        limit: int,
        ends: frozenset[int],
        index: int,
        priority: int,
        salt: str | None,
        loaded: LoadedAdapter | None,
    ) -> Request:
        sequence = TokenSequence(next(self._names), list(ids), len(ids), limit, priority, salt)
        if params.best_of is not None and params.best_of > params.n and params.logprobs is None:
            params = params.with_changes(logprobs=0)  # by which the answers are ranked
        grammar = self._grammars.matcher(params)
        vocab_size = self.model.config.vocab_size
        state = SamplingState(params, prompt=ids, vocab_size=vocab_size, end_tokens=ends, index=index, grammar=grammar)
        ends = ends | frozenset(params.stop_token_ids)
        return Request(sequence, state, self.tokenizer, ends, loaded and loaded.adapter)

    def _likeliest(
        self, prompt: Prompt, params: SamplingParams, priority: int, adapter: str | None, cache_salt: str | None
    ) -> Completion:
        """The answer that beam search finds, and the next best. Each step of it is a request: beams find what they share in
        the pages of the step before."""
        asked: dict[str, Any] = {"priority": priority, "adapter": adapter, "cache_salt": cache_salt}
        first = self.prepare(prompt, params.with_changes(n=1), **asked)
        first.sampling.params = params
        ids, limit = first.sequence.tokens, first.sequence.limit - first.sequence.prompt_length
        one_token = SamplingParams(max_tokens=1, temperature=0)

        def next_logits(texts: list[list[int]], parents: list[int]) -> Tensor:
            probes = [self.prepare(text, one_token, **asked) for text in texts]
            for probe in probes:
                probe.is_probe = True
            self._completions(probes, [one_token] * len(probes))
            return torch.stack([probe.logits_V for probe in probes if probe.logits_V is not None])

        found = beam_search(next_logits, ids, first.sampling, limit)
        completions = []
        for beam in found:
            text = AnswerText(self.tokenizer, ())
            ended = first.sampling.ends(beam.tokens[-1])
            shown = "".join(text.feed(token) for token in beam.tokens[: len(beam.tokens) - ended]) + text.flush()
            completions.append(Completion(shown, beam.tokens, "stop" if ended else "length", len(ids)))
        return replace(completions[0], others=tuple(completions[1:]))

    def _begin(self, requests: list[Request]) -> None:
        # those of several processes are read once, and stay
        if not self.core.busy and self._sharded is None and not self._stamp.is_of(self.model):
            self._forget()
        for request in requests:
            self.core.add(request)

    def _finish(self, requests: list[Request]) -> None:
        """Step until all are done; other threads may take a step in between, or have taken the last one."""
        waited_for = [each for request in requests for each in (request, *request.siblings)]
        while not all(request.done for request in waited_for):
            with self._lock:
                if not all(request.done for request in waited_for):
                    self.core.step()
        for request in waited_for:
            if request.error is not None:
                raise request.error

    def _stream(self, request: Request) -> Generator[Chunk, None, None]:
        with self._lock:
            self._begin([request])
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

    def _replace(self, weights: dict[str, Tensor]) -> None:
        own = self.model.state_dict()
        for name, tensor in weights.items():
            if name not in own:
                raise RequestError(f"the model has no weight {name!r}")
            if own[name].shape != tensor.shape:
                raise RequestError(f"weight {name!r} has shape {tuple(own[name].shape)}, not {tuple(tensor.shape)}")
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    def _forget(self) -> None:
        self.core.scheduler.preempt_all()
        self.core.scheduler.forget()
        self.core.executor.weights_changed()
        self._stamp = WeightsStamp(self.model)


def _salt(loaded: LoadedAdapter | None, cache_salt: str | None) -> str | None:
    """What the keys of a prompt depend on besides its tokens, and who may find them; no two pairs have the same."""
    return None if loaded is None and cache_salt is None else repr((loaded and loaded.salt, cache_salt))


def _for_each(prompts: Sequence[Prompt], given: Any, what: str) -> list[Any]:
    """One of each prompt, where one may be given for all."""
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * len(prompts)
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts):,} prompts and {len(each):,} {what}; give one for all, or one for each")
    return each


def _whole(request: Request) -> Completion:
    chunks = request.drain()
    assert request.finish_reason is not None
    log_probs = None if request.params.logprobs is None else [one for chunk in chunks for one in chunk.log_probs or []]
    text = "".join(chunk.text for chunk in chunks)
    return Completion(text, request.token_ids, request.finish_reason, request.sequence.prompt_length, log_probs)


def _mean_log_prob(completion: Completion) -> float:
    assert completion.log_probs, "answers that are ranked have log-probabilities"
    return sum(one.log_probs.token for one in completion.log_probs if one.log_probs) / len(completion.log_probs)
