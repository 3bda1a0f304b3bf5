"""Texts that are read and not continued: scores of continuations, and what is captured inside the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from bessemer.inference.adapters import LoadedAdapters
from bessemer.inference.capture import Capture, Captured, Pooling, embeddings
from bessemer.inference.engine_core import EngineCore
from bessemer.inference.request import Prompt, Prompts, ScheduledRequest
from bessemer.inference.request_builder import RequestBuilder, as_prompts, for_each
from bessemer.inference.scores import Score, ScoreItem
from bessemer.model.decoder import Decoder


class Reading(ABC):
    """The part of the engine that generates nothing: evaluation, embeddings and probes use it."""

    model: Decoder
    core: EngineCore
    _adapters: LoadedAdapters
    _builder: RequestBuilder

    @abstractmethod
    def _serve(self, requests: Sequence[ScheduledRequest]) -> None:
        """Compute these requests until all are done. Raises the first error that one of them has."""

    def score(
        self,
        prefix: Prompt,
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
        for item, name in zip(items, for_each(items, adapter, "adapters"), strict=True):
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
        """What is captured of each prompt while it is read; nothing is generated. The other arguments are those of `generate`.

        Raises RequestError for what the model does not have, before any prompt is read.
        """
        prompts = as_prompts(prompts)
        requests = []
        for prompt, name in zip(prompts, for_each(prompts, adapter, "adapters"), strict=True):
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

        layer: as of `Capture.states`; None: after the last norm, as the head reads them. normalise: to length 1. Raises as
        `capture`.
        """
        last = self.model.config.num_hidden_layers if layer is None else layer
        capture = Capture(states=(last,), positions="all" if pooling == "mean" else "last")
        states = [found.states[last] for found in self.capture(prompts, capture, adapter=adapter)]
        return embeddings(states, self._last_norm if layer is None else None, normalise=normalise)

    def _last_norm(self, states_PD: Tensor) -> Tensor:
        normed_PD: Tensor = self.model.norm(states_PD.to(self.model.device, self.model.dtype))
        return normed_PD.float()
