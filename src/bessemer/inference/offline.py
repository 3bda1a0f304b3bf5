"""Offline inference: what evaluation, probes and trainers use of the engine.

- `Reading`: texts that are read and not continued: scores of continuations, embeddings, what is captured inside the model.
- `Rollouts`: sampled completions as padded tensors, with their log-probabilities and the versions of the weights.
- `WeightUpdates`: weights and adapters that change under in-flight requests.
- `Sleep`: an engine that gives up the memory of its KV cache for a while.
- `TextScorer`: logits of every next token of whole texts, by the engine's own runner and without a scheduler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bessemer.core.concurrency import FairLock
from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.hashing import derive_seed
from bessemer.inference.capture import Capture, Captured, Pooling, embeddings
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine_core import EngineCore
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.build import new_runner, page_type, paged_memory, resolved_for
from bessemer.inference.execution.kv_cache import layer_groups
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.execution.weights import (
    LoadedAdapters,
    WeightsStamp,
    check_whole_weights,
    copied_adapter,
    replace_weights,
)
from bessemer.inference.request import Prompts, Request, ScheduledRequest, as_prompts, for_each
from bessemer.inference.request_builder import ContextShift, RequestBuilder
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.scores import Score, ScoreItem
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.attention.base import is_recurrent
from bessemer.model.cpu_kernels import origin
from bessemer.model.decoder import Decoder
from bessemer.model.vision.prompts import PictureReader

# Shapes: P prompts, R rows (P · n), T tokens of the longest row.

LogProbsMode = Literal["raw", "temperature", "sampled"]


@dataclass(frozen=True)
class Rollouts:
    """n completions of each of P prompts; rows p · n … p · n + n - 1 are those of prompt p. On the host.

    tokens: (R, T) int64, the prompt, the completion, then zeros.
    mask: (R, T) bool, true at generated tokens, an end token included.
    log_probs: (R, T) float32, of generated tokens in nats; zero elsewhere.
    weight_version: (R, T) int32, `Engine.weight_version` when each generated token was sampled; zero elsewhere.
    prompt_lengths, lengths: (R,) int64, tokens of the prompt, and of prompt and completion together.
    finish_reasons, texts: of each row, as in `Completion`.
    """

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    weight_version: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    finish_reasons: tuple[str, ...]
    texts: tuple[str, ...]


def params_of_prompts(
    params: SamplingParams | Sequence[SamplingParams], prompts: int, n: int, mode: LogProbsMode
) -> list[SamplingParams]:
    """The sampling parameters of each prompt's n completions.

    Parameters for all with a seed give each prompt random numbers of its own, so that a repeated prompt gets other completions.
    Raises RequestError for parameters whose completions are not plain samples, or another number of them than of prompts;
    ConfigError for n below 1.
    """
    if isinstance(params, SamplingParams):
        seed = params.seed
        seeds = [seed if seed is None or not prompt else derive_seed(seed, "prompt", prompt) for prompt in range(prompts)]
        each = [params.with_changes(seed=own) for own in seeds]
    else:
        each = list(params)
    if len(each) != prompts:
        raise RequestError(f"{prompts:,} prompts and {len(each):,} params; give one for all, or one for each")
    for own in each:
        if own.beam_width or own.best_of is not None:
            raise RequestError("rollouts are samples, none of them left out: leave out best_of and beam_width")
        if not own.max_tokens:
            raise RequestError("rollouts are samples of at least a token: raise max_tokens above 0")
    return [own.with_changes(n=n, logprobs=0, logprobs_mode=mode, prompt_logprobs=None) for own in each]


def collect_rollouts(requests: Sequence[Request]) -> Rollouts:
    """The rollouts of requests that are done, in their order, each followed by its siblings. Takes the requests' chunks."""
    rows = [each for request in requests for each in (request, *request.siblings)]
    prompt_lengths_R = torch.tensor([row.sequence.prompt_length for row in rows], dtype=torch.int64)
    lengths_R = torch.tensor([len(row.sequence.tokens) for row in rows], dtype=torch.int64)
    shape = (len(rows), int(lengths_R.max()) if rows else 0)
    tokens_RT = torch.zeros(shape, dtype=torch.int64)
    log_probs_RT = torch.zeros(shape)
    versions_RT = torch.zeros(shape, dtype=torch.int32)
    texts, reasons = [], []
    for place, row in enumerate(rows):
        start, end = row.sequence.prompt_length, len(row.sequence.tokens)
        chunks = row.drain()
        sampled = [one for chunk in chunks for one in chunk.log_probs or []]
        tokens_RT[place, :end] = torch.tensor(row.sequence.tokens)
        log_probs_RT[place, start:end] = torch.tensor([one.log_probs.token for one in sampled if one.log_probs])
        versions_RT[place, start:end] = torch.tensor(row.weight_versions, dtype=torch.int32)
        texts.append("".join(chunk.text for chunk in chunks))
        assert row.finish_reason is not None, "a request that is done has ended or failed"
        reasons.append(row.finish_reason)
    columns_T = torch.arange(shape[1])
    mask_RT = (columns_T >= prompt_lengths_R[:, None]) & (columns_T < lengths_R[:, None])
    return Rollouts(tokens_RT, mask_RT, log_probs_RT, versions_RT, prompt_lengths_R, lengths_R, tuple(reasons), tuple(texts))


class Reading(ABC):
    """The part of the engine that generates nothing: evaluation, embeddings and probes use it."""

    config: EngineConfig
    model: Decoder
    core: EngineCore
    _adapters: LoadedAdapters
    _builder: RequestBuilder

    @abstractmethod
    def _serve(self, requests: Sequence[ScheduledRequest]) -> None:
        """Compute these requests until all are done. Raises the first error that one of them has."""

    @property
    def arithmetic(self) -> str:
        """One line about how it computes on this machine: compiled kernels or PyTorch, in which types."""
        return f"computed by {self.core.runner.arithmetic}"

    @property
    def kernels_origin(self) -> str | None:
        """One line about where the compiled CPU kernels are from, or why there are none; None where the engine wants none."""
        wanted = self.config.cpu_kernels != "off" and self.core.runner.model.device.type == "cpu"
        return origin() if wanted else None

    @property
    def context_shift(self) -> ContextShift | None:
        """How a text that outgrows the context goes on; None where it ends there."""
        return self._builder.shift

    @property
    def pictures(self) -> PictureReader | None:
        """What prepares pictures for the model; None for one that reads none."""
        return self._builder.pictures

    def score(
        self,
        prefix: str | Sequence[int],
        continuations: Sequence[str] | Sequence[Sequence[int]],
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """How likely each of these continuations is after a prefix, which is computed once for all; as `score_items`."""
        return self.score_items([(prefix, continuations)], adapter=adapter, cache_salt=cache_salt)[0]

    def score_items(
        self,
        items: Sequence[ScoreItem],
        *,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[list[Score]]:
        """The scores of many items, each a prefix with its continuations, all in flight at once.

        Texts: white space at the end of a prefix belongs to its continuations, and an empty prefix is the begin token
        (`encode_continuations`). Token ids are taken as they are. A prefix and its continuation may have a token more than the
        context, as the last one is not read. The other arguments are those of `generate`. Raises RequestError for an item
        that can never be scored, before any is computed.
        """
        requests = []
        for item, name in zip(items, for_each(len(items), adapter, "adapters"), strict=True):
            loaded = self._adapters.of(name)
            request, longest = self._builder.score_request(item, priority, loaded, cache_salt)
            self.core.scheduler.check(longest)
            requests.append(request)
        self._serve(requests)
        return [request.scores() for request in requests]

    def capture(
        self,
        prompts: Prompts,
        capture: Capture,
        *,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[Captured]:
        """Capture from each prompt while it is read; nothing is generated. The other arguments are those of `generate`.

        Raises RequestError for what the model does not have, before any prompt is read.
        """
        prompts = as_prompts(prompts)
        requests = []
        for prompt, name in zip(prompts, for_each(len(prompts), adapter, "adapters"), strict=True):
            loaded = self._adapters.of(name)
            ids = self._builder.prompt_ids(prompt)
            requests.append(self._builder.capture_request(ids, capture, priority, loaded, cache_salt))
            self.core.scheduler.check(len(ids) + 1)
        self._serve(requests)
        return [request.captured for request in requests]

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling: Pooling = "mean",
        layer: int | None = None,
        normalise: bool = True,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Tensor:
        """A vector for each prompt, (P, D) float32: the mean of its tokens' hidden states, or the state of its last token.

        layer: as in `Capture.states`; None: after the last norm, as the head reads them. normalise: to length 1. Raises as
        `capture`.
        """
        last = self.model.config.num_hidden_layers if layer is None else layer
        capture = Capture(states=(last,), positions="all" if pooling == "mean" else "last")
        states = [captured.states[last] for captured in self.capture(prompts, capture, adapter=adapter)]
        return embeddings(states, self._last_norm if layer is None else None, normalise=normalise)

    def lens_logits(self, states_TD: Tensor) -> Tensor:
        """Logits that the last norm and the head make of captured hidden states, (T, V) float32. Any thread may ask."""
        return self.core.runner.lens_logits(states_TD)

    def _last_norm(self, states_PD: Tensor) -> Tensor:
        normed_PD: Tensor = self.model.norm(states_PD.to(self.model.device, self.model.dtype))
        return normed_PD.float()


class Sleep:
    """An engine that gives the memory of its KV cache to others for a while."""

    core: EngineCore
    _lock: FairLock
    _is_asleep: bool

    @property
    def is_asleep(self) -> bool:
        """Whether the KV cache's memory is free."""
        return self._is_asleep

    def sleep(self) -> None:
        """Free the memory of the KV cache for other users of the device, until `wake`. Cached keys are forgotten.

        Raises RequestError while requests are in flight. Of a draft model the cache stays.
        """
        with self._lock:
            if self.core.busy:
                raise RequestError("the engine has requests in flight; it may sleep when they have ended")
            if not self._is_asleep:
                self.core.finish_step()
                self.core.scheduler.preempt_all()
                self.core.scheduler.forget()
                self.core.runner.release_memory()
                self._is_asleep = True

    def wake(self) -> None:
        """Have the memory of the KV cache again. An engine that is awake stays as it is."""
        with self._lock:
            if self._is_asleep:
                self.core.runner.restore_memory()
                self._is_asleep = False


class WeightUpdates:
    """Updates of an engine's weights and adapters, and their version. No key that other weights computed is used again."""

    model: Decoder
    core: EngineCore
    _lock: FairLock
    _sharded: ShardedModel | None
    _adapters: LoadedAdapters
    _stamp: WeightsStamp

    @property
    def weight_version(self) -> int:
        """How often the weights were changed since the start, adapters' updates included; or the last version given."""
        return self.core.weight_version

    def update_weights(self, weights: Mapping[str, Tensor] | None = None, *, version: int | None = None) -> None:
        """Replace weights, by the names of the model's `state_dict`; None: the caller has changed them in place.

        In-flight requests continue with the new weights, and their keys and values are computed again; DoRA adapters are
        adjusted. version: the new `weight_version`; None: the present one plus 1. For a model that is split over processes,
        give whole tensors by the names that it has in one process. Raises RequestError for a name or a shape that the model
        does not have, and then changes nothing; ConfigError where weights are None and the model is split.
        """
        with self._lock:
            if self._sharded is not None and self._sharded.axis is None:
                self._replace_shards(weights)
            elif weights is not None:
                replace_weights(self.model, weights)
            self._weights_changed(version)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self._adapters.names

    def load_adapter(self, name: str, adapter: Path | str | Adapter) -> None:
        """Let requests name the adapter in a folder, or a copy of one in memory. One of the same name is replaced.

        In-flight requests keep the adapter that they began with. Raises ArtefactError for a folder that holds none, or
        one that was made for another model; RequestError for one in memory that does not fit the model.
        """
        loaded = self._own_adapter(adapter)
        with self._lock:
            self._adapters.load(name, loaded)

    def update_adapter(self, name: str, adapter: Adapter, *, version: int | None = None) -> None:
        """Take other numbers for a loaded adapter, which are copied; the base model and its packed weights stay.

        Its in-flight requests go on with them, and their keys are computed again. Blocks of the base model and of other
        adapters stay in the prefix cache. version: the `weight_version` from now on; None: one more. Raises RequestError for a
        name that is not loaded and an adapter that does not fit the model, and changes nothing then.
        """
        self._adapters.find(name)
        own = self._own_adapter(adapter)
        with self._lock:
            self.core.change_adapter(*self._adapters.update(name, own))
            self._count_version(version)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter. In-flight requests keep it, and its memory is free when they have ended.

        Raises RequestError for a name that is not loaded.
        """
        with self._lock:
            self._adapters.unload(name)

    # -- inside

    def _notice_changes(self, request: ScheduledRequest) -> None:
        """Before a request begins: find weights changed in place, and updates of its adapter since it was prepared."""
        # the weights of several processes change by `update_weights` alone
        if not self.core.busy and self._sharded is None and not self._stamp.is_of(self.model):
            self._weights_changed()
        if request.adapter is not None and (updated := self._adapters.updated(request.adapter)) is not None:
            self.core.use_adapter(request, updated)

    def _own_adapter(self, adapter: Path | str | Adapter) -> Adapter:
        """The adapter in a folder, or a copy of one in memory, as this process computes it: of a sharded model its shard."""
        runner, samples = self.core.runner, None
        if isinstance(adapter, Adapter):
            if self._sharded is not None and adapter.has_magnitudes:
                raise RequestError("the adapter is DoRA's, whose norms are of whole weights, and this model is sharded")
            whole = copied_adapter(adapter, self.model)
        else:
            if self._sharded is not None:
                with self._lock:
                    samples = runner.weight_samples()
            whole = read_adapter(adapter, self.model, samples)
        if whole.whole:
            raise RequestError(
                "the adapter has modules trained whole (modules_to_save), which cannot lie beside a model that others use; "
                "merge it: bessemer merge MODEL FOLDER --adapter ADAPTER"
            )
        if self._sharded is None:
            return whole
        with self._lock:
            return runner.share_adapter(whole)

    def _replace_shards(self, weights: Mapping[str, Tensor] | None) -> None:
        if weights is None:
            raise ConfigError("parallel: every process has weights of its own; give update_weights the whole tensors")
        check_whole_weights(self.model.config, weights)
        # an interrupt may come when the shards are replaced: no keys of the weights before are left then
        self._forget_keys()
        self.core.runner.replace_weights(weights)

    def _weights_changed(self, version: int | None = None) -> None:
        self._forget_keys()
        self.core.runner.weights_changed()
        self._adapters.refit(self.model)
        self._stamp = WeightsStamp(self.model)
        self._count_version(version)

    def _forget_keys(self) -> None:
        self.core.finish_step()
        self.core.scheduler.preempt_all()
        self.core.scheduler.forget()

    def _count_version(self, version: int | None) -> None:
        self.core.weight_version = self.core.weight_version + 1 if version is None else version


# Shapes: N tokens of a chunk, V vocabulary.


class TextScorer:
    """Logits of one text at a time, in chunks, by the runner that the engine has for an opened model."""

    def __init__(self, model: Decoder, longest: int, config: EngineConfig | None = None) -> None:
        """longest: tokens of the longest text. Raises ConfigError where the model cannot be served as the settings say."""
        config = config or EngineConfig()
        config = resolved_for(config, model.config, page_type(model, config), model.device)
        self._model = model
        self._longest = longest
        self._chunk = config.max_num_batched_tokens
        groups, pages = layer_groups(model.config), -(-longest // config.block_size)
        memory = paged_memory(model, config, [pages] * len(groups), state_slots=1, longest=longest)
        self._tables = [list(range(pages)) for _ in groups]
        self._slot = 0 if is_recurrent(model.config) else None
        self._runner = new_runner(model, memory, config, opened=True)

    @property
    def arithmetic(self) -> str:
        """How the logits are computed, in words."""
        return self._runner.arithmetic

    def logits(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Logits after each token of a text, chunk after chunk, (N, V) float32 each; take all before the next text."""
        assert len(tokens) <= self._longest, "the KV blocks hold no longer text"
        for start in range(0, len(tokens), self._chunk):
            chunk = list(tokens[start : start + self._chunk])
            count = len(chunk)
            batch = Batch.empty(len(self._tables))
            batch.append_tokens(chunk, start, self._tables, wanted=range(count), prompt_length=len(tokens), slot=self._slot)
            yield self._runner.forward(batch)
