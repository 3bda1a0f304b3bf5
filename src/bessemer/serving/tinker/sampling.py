"""Sampling sessions: the base model, weights that were saved, or the weights of a run as they are now, on the engine.

The engine holds the most recently used adapters. A session without a name samples from a copy of its run's weights, and each
run keeps the latest few of these copies. A session of `inflight` weights follows its run.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine
from bessemer.inference.request import Completion
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import Sampled
from bessemer.model.adapters import Adapter
from bessemer.serving.config import STOP_CHARACTERS
from bessemer.serving.tinker.protocol import Sample, SamplingParameters
from bessemer.serving.tinker.states import Address, StateStore
from bessemer.serving.tinker.wire import SampledTokens, write_sample_response


@dataclass(frozen=True)
class SamplingSession:
    """What a client samples from. adapter: the engine's name of weights that are only in memory. address: that of saved
    weights. Neither: the base model."""

    id: str
    owner: str
    base_model: str
    adapter: str | None = None
    address: Address | None = None


class Samplers:
    """The engine and its adapters. `sample` runs on the event loop; the others may be called from any thread."""

    def __init__(self, engine: Engine, states: StateStore, *, most_adapters: int, snapshots: int) -> None:
        """most_adapters: most saved weights in the engine at once. snapshots: most copies without a name for each run."""
        self.engine = engine
        self._states = states
        self._most_adapters = most_adapters
        self._snapshots = snapshots
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._of_runs: dict[str, list[str]] = {}
        self._loading = asyncio.Lock()
        #: Requests that wait or are computed.
        self.requests = 0
        #: Limits the requests in the engine; the others wait here, where they cost nothing.
        self._places = asyncio.Semaphore(2 * engine.max_num_seqs)

    def add_snapshot(self, run: str, session: str, adapter: Adapter) -> str:
        """Keep a copy of a run's weights for a session; returns its name in the engine. The run's oldest copy above the limit
        is dropped."""
        name = f"snapshot {session}"
        self.engine.load_adapter(name, adapter)
        names = self._of_runs.setdefault(run, [])
        names.append(name)
        while len(names) > self._snapshots:
            self._unload(names.pop(0))
        return name

    def follow(self, run: str, adapter: Adapter) -> str:
        """Give all `inflight` sessions of a run its present weights; returns their name in the engine."""
        name = f"inflight {run}"
        if name in self.engine.adapters:
            self.engine.update_adapter(name, adapter)
        else:
            self.engine.load_adapter(name, adapter)
        return name

    def drop_run(self, run: str) -> None:
        """Forget the weights of a run that were never saved."""
        for name in [*self._of_runs.pop(run, []), f"inflight {run}"]:
            self._unload(name)

    def drop_saved(self, address: Address) -> None:
        """Forget saved weights that were deleted or saved anew."""
        if str(address) in self._loaded:
            del self._loaded[str(address)]
            self._unload(str(address))

    async def sample(self, session: SamplingSession, body: Sample, salt: str | None) -> tuple[bytes, int, int]:
        """The reply to a request, and how many tokens its prompt and its samples have. Raises RequestError for a request that
        cannot be sampled."""
        ids, params = body.prompt.token_ids(), sampling_params(body)
        if not ids:
            raise RequestError("prompt: it has no token; send the begin token, or a text's first ones")
        check_ids(ids, self.engine.model.config.vocab_size)
        last = body.prompt_logprobs_last_n
        if last is not None and last >= len(ids):
            raise RequestError(f"prompt_logprobs_last_n: {last:,} of a prompt of {len(ids):,} tokens; at most {len(ids) - 1:,}")
        self.requests += 1
        try:
            adapter = await self._adapter(session)
            async with self._places:
                (completion,) = await self.engine.agenerate([ids], params, adapter=adapter, cache_salt=salt)
        finally:
            self.requests -= 1
        samples = [completion, *completion.others]
        answer = write_sample_response(
            [_sampled(each, body.topk_sample_logprobs) for each in samples],
            _prompt_log_probs(completion, body),
            _prompt_top(completion, body),
            completion.cached_tokens,
        )
        return answer, len(ids), sum(each.completion_tokens for each in samples)

    async def _adapter(self, session: SamplingSession) -> str | None:
        """The engine's name of a session's weights; loads them first where the engine does not hold them."""
        if session.address is None:
            if session.adapter is not None and session.adapter not in self.engine.adapters:
                raise RequestError(
                    "the weights of this sampling session are gone: they were saved without a name, and a run keeps the latest "
                    f"{self._snapshots} of those; save them by save_weights_for_sampler"
                )
            return session.adapter
        name = str(session.address)
        async with self._loading:
            if name not in self._loaded:
                self._states.find(session.address)
                await asyncio.to_thread(self.engine.load_adapter, name, self._states.path(session.address))
                while len(self._loaded) >= self._most_adapters:
                    oldest, _ = self._loaded.popitem(last=False)
                    self._unload(oldest)
                self._loaded[name] = None
            self._loaded.move_to_end(name)
        return name

    def _unload(self, name: str) -> None:
        if name in self.engine.adapters:
            self.engine.unload_adapter(name)


def sampling_params(body: Sample) -> SamplingParams:
    """A request's parameters in the engine's form. Raises RequestError for those that the engine does not support."""
    given = body.sampling_params
    texts, tokens, ignore_eos = _stops(given)
    most = 1 << 30 if given.max_tokens is None else given.max_tokens
    wants_prompt = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    if body.prompt_logprobs_last_n is not None and not body.prompt_logprobs:
        raise RequestError("prompt_logprobs_last_n: of the log-probabilities of a prompt; set prompt_logprobs too")
    return SamplingParams(
        max_tokens=most,
        temperature=given.temperature,
        top_k=max(given.top_k, 0),
        top_p=given.top_p,
        seed=None if given.seed is None else abs(given.seed),
        stop=texts,
        stop_token_ids=tokens,
        ignore_eos=ignore_eos,
        n=body.num_samples,
        logprobs=body.topk_sample_logprobs,
        prompt_logprobs=body.topk_prompt_logprobs if wants_prompt else None,
    )


def check_ids(ids: list[int], vocabulary: int) -> None:
    """Raises RequestError for a token that the model does not have."""
    if max(ids) >= vocabulary:
        raise RequestError(
            f"prompt: token {max(ids)} is none of this model's {vocabulary:,}; is the tokenizer another model's?"
        )


def _stops(given: SamplingParameters) -> tuple[list[str], list[int], bool]:
    """Texts and tokens at which a sample ends, and whether it goes on after the end token, as it does for an empty list."""
    stop = [given.stop] if isinstance(given.stop, str) else given.stop
    texts = [each for each in stop or () if isinstance(each, str)]
    if "" in texts or sum(map(len, texts)) > STOP_CHARACTERS.most:
        raise RequestError(f"sampling_params.stop: texts of at least a character, and of {STOP_CHARACTERS.most:,} together")
    tokens = [each for each in stop or () if isinstance(each, int)]
    return texts, tokens, stop == []


def _sampled(completion: Completion, top: int) -> SampledTokens:
    chosen = completion.log_probs or []
    log_probs = [each.log_probs.token if each.log_probs else math.nan for each in chosen]
    likeliest = [each.log_probs.top if each.log_probs else () for each in chosen] if top else None
    return SampledTokens(completion.token_ids, log_probs, completion.finish_reason == "length", likeliest)


def _prompt_tokens(completion: Completion, body: Sample) -> list[Sampled | None]:
    """The log-probabilities of a prompt's tokens: None for the first, and for those before the last
    `prompt_logprobs_last_n`."""
    tokens: list[Sampled | None] = [None, *(completion.prompt_log_probs or [])]
    last = body.prompt_logprobs_last_n
    return tokens if last is None else [*[None] * (len(tokens) - last), *tokens[len(tokens) - last :]]


def _prompt_log_probs(completion: Completion, body: Sample) -> list[float] | None:
    if not body.prompt_logprobs:
        return None
    return [each.log_probs.token if each and each.log_probs else math.nan for each in _prompt_tokens(completion, body)]


def _prompt_top(completion: Completion, body: Sample) -> list[tuple[tuple[int, float], ...]] | None:
    if not body.topk_prompt_logprobs:
        return None
    return [each.log_probs.top if each and each.log_probs else () for each in _prompt_tokens(completion, body)]
