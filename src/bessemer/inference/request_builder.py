"""Builds the engine's requests from prompts and parameters, and refuses what is known to be wrong beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from numbers import Integral
from typing import Any

from bessemer.core.errors import RequestError
from bessemer.inference.adapters import LoadedAdapter
from bessemer.inference.capture import Capture, CaptureRequest, Recorder
from bessemer.inference.request import LogitsRequest, Prompt, Prompts, Request
from bessemer.inference.sampling.beam_search import BeamSearch
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.penalties import TokenRules
from bessemer.inference.sampling.sampler import SamplingState
from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.inference.scores import ScoreItem, ScoreRequest
from bessemer.model.config import ModelConfig
from bessemer.tokenization.continuations import encode_continuations
from bessemer.tokenization.tokenizer import Tokenizer


class RequestBuilder:
    """Makes requests of one model. Any thread may use it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        end_tokens: frozenset[int],
        context_length: int,
        context_name: str,
        *,
        shared: bool,
    ) -> None:
        """context_name: what limits the length, in the words of an error: the model's context, or a setting. shared: whether
        several processes share the model."""
        self._tokenizer = tokenizer
        self._vocab_size = config.vocab_size
        self._config = config
        self._shared = shared
        self._end_tokens = end_tokens
        self._context_length = context_length
        self._context_name = context_name
        self._names = count()
        self._grammars = GrammarCompiler(tokenizer, config.vocab_size, end_tokens)

    def prompt_ids(self, prompt: Prompt, least: int = 1) -> list[int]:
        """The tokens of a prompt. least: tokens that must fit behind it. Raises RequestError where it has none, one that the
        model has not, or too many."""
        if isinstance(prompt, bytes | bytearray | Mapping):
            raise RequestError(
                f"a prompt is a text or token ids, got {type(prompt).__name__}; decode bytes, and give messages to chat"
            )
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        self._check_ids(ids, "the prompt")
        if len(ids) + least > self._context_length:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens and {self._context_name} is {self._context_length:,}, answer included; "
                "shorten the prompt"
            )
        return ids

    def request(
        self,
        ids: list[int],
        params: SamplingParams,
        priority: int,
        loaded: LoadedAdapter | None,
        cache_salt: str | None,
        capture: Capture | None = None,
        *,
        streams: bool = True,
    ) -> Request:
        """A request for a completion of `prompt_ids`, with the other completions of the same prompt as its `siblings`.

        streams: as of `Request`. Raises RequestError for parameters that cannot be served.
        """
        limit = self._limit(ids, params)
        salt = _salt(loaded, cache_salt)
        # what is found in the prefix cache has no logits, and no states
        computed_from = None if params.prompt_logprobs is None else 0
        if capture is not None:
            capture.check(self._config, shared=self._shared)
            if (params.best_of or params.n) > 1 or params.beam_width:
                raise RequestError("capture: it is of one completion; leave out n, best_of and beam_width")
            if computed_from is None:
                computed_from = capture.first(len(ids))
        if params.best_of is not None and params.best_of > params.n and params.logprobs is None:
            # by which the completions are ranked
            params = params.with_changes(logprobs=0, logprobs_mode="raw")
        end_tokens = self._ends(params) | frozenset(params.stop_token_ids)
        rules = TokenRules(params, self._vocab_size)
        first, *others = [
            Request(
                self._sequence(ids, limit, priority, salt, computed_from),
                self._sampling(ids, params, index, rules),
                self._tokenizer,
                end_tokens,
                loaded and loaded.adapter,
                None if capture is None else Recorder(capture, len(ids)),
                streams=streams,
            )
            for index in range(params.best_of or params.n)
        ]
        first.siblings = others
        return first

    def beam_search(self, ids: list[int], params: SamplingParams) -> BeamSearch:
        """A beam search from `prompt_ids`. Raises RequestError for parameters that cannot be served."""
        return BeamSearch(ids, self._sampling(ids, params, 0), self._limit(ids, params) - len(ids))

    def logits_request(
        self, ids: list[int], priority: int, loaded: LoadedAdapter | None, cache_salt: str | None
    ) -> LogitsRequest:
        """A request for the logits after these tokens, which are fewer than the context has."""
        sequence = self._sequence(ids, len(ids) + 1, priority, _salt(loaded, cache_salt))
        return LogitsRequest(sequence, loaded and loaded.adapter)

    def score_request(
        self, item: ScoreItem, priority: int, loaded: LoadedAdapter | None, cache_salt: str | None
    ) -> tuple[ScoreRequest, int]:
        """A request for the scores of an item's continuations, and the most tokens that a sequence of it comes to.

        An empty prefix is the begin token. Texts are encoded as `encode_continuations`; token ids are taken as they are,
        and a text beside token ids is encoded alone. Raises RequestError where there is no continuation, one has no tokens or
        those of another model, or with its prefix more than the context.
        """
        prefix, continuations = self._score_ids(item)
        self._check_ids(prefix, "the prefix")
        for index, tokens in enumerate(continuations):
            if not tokens:
                raise RequestError(
                    f"continuation {index} has no tokens of its own behind its prefix; give it more text, or token ids"
                )
            self._check_ids(tokens, f"continuation {index}")
        longest = len(prefix) + max(map(len, continuations))
        # the last token is not read
        if longest - 1 > self._context_length:
            raise RequestError(
                f"prefix and continuation have {longest:,} tokens, of which all but the last are read, and "
                f"{self._context_name} is {self._context_length:,}; shorten them"
            )
        new_sequence = partial(self._score_sequence, len(prefix), priority)
        salt = _salt(loaded, cache_salt)
        return ScoreRequest(prefix, continuations, new_sequence, salt, loaded and loaded.adapter), longest

    def _score_ids(self, item: ScoreItem) -> tuple[list[int], list[list[int]]]:
        if isinstance(item, str) or len(item) != 2:
            raise RequestError("an item to score is a pair: a prefix and a list of continuations")
        prefix, continuations = item
        if isinstance(continuations, str) or not len(continuations) or isinstance(continuations[0], Integral):
            raise RequestError("give a list of continuations, at least one")
        texts = [each for each in continuations if isinstance(each, str)]
        if isinstance(prefix, str) and len(texts) == len(continuations):
            return encode_continuations(self._tokenizer, prefix, texts)
        ids = self._tokenizer.encode(prefix) if isinstance(prefix, str) else list(prefix)
        return ids or [self._tokenizer.bos_id], [
            self._tokenizer.encode(each, add_bos=False) if isinstance(each, str) else list(each) for each in continuations
        ]

    def _score_sequence(
        self, prefix_length: int, priority: int, tokens: list[int], logits_from: int, salt: str | None
    ) -> TokenSequence:
        return TokenSequence(
            next(self._names), tokens, prefix_length, len(tokens) + 1, priority, salt, logits_from, logits_from
        )

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        try:
            inside = all(0 <= id < self._vocab_size for id in ids)
        except TypeError:
            raise RequestError(f"{name} must be a text or token ids, got a list of {type(ids[0]).__name__}") from None
        if not inside:
            raise RequestError(f"{name} has a token id outside the vocabulary of {self._vocab_size:,} tokens")

    def capture_request(
        self, ids: list[int], capture: Capture, priority: int, loaded: LoadedAdapter | None, cache_salt: str | None
    ) -> CaptureRequest:
        """A request for what is captured of `prompt_ids`. Raises RequestError for what there is not to capture."""
        capture.check(self._config, shared=self._shared)
        computed_from = min(capture.first(len(ids)), len(ids) - 1)
        sequence = self._sequence(ids, len(ids) + 1, priority, _salt(loaded, cache_salt), computed_from=computed_from)
        return CaptureRequest(sequence, Recorder(capture, len(ids)), loaded and loaded.adapter)

    def _limit(self, ids: list[int], params: SamplingParams) -> int:
        """The most tokens of prompt and completion together, or of a prompt alone and a placeholder that is never read."""
        return min(len(ids) + params.max_tokens, self._context_length) if params.max_tokens else len(ids) + 1

    def _sequence(
        self,
        ids: list[int],
        limit: int,
        priority: int,
        salt: str | None,
        computed_from: int | None = None,
    ) -> TokenSequence:
        return TokenSequence(next(self._names), list(ids), len(ids), limit, priority, salt, computed_from=computed_from)

    def _sampling(self, ids: list[int], params: SamplingParams, index: int, rules: TokenRules | None = None) -> SamplingState:
        return SamplingState(
            params,
            prompt=ids,
            vocab_size=self._vocab_size,
            end_tokens=self._ends(params),
            index=index,
            grammar=self._grammars.matcher(params),
            rules=rules,
        )

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._end_tokens


def as_prompts(prompts: Prompts) -> list[Prompt]:
    """The prompts that are meant: a text, or token ids, alone are one prompt."""
    if isinstance(prompts, str | bytes | bytearray | Mapping):
        return [prompts]  # type: ignore[list-item]  # what is no prompt, `prompt_ids` refuses
    if len(prompts) and (isinstance(prompts[0], Integral) or getattr(prompts[0], "ndim", None) == 0):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def for_each(prompts: Sequence[Any], given: Any, what: str) -> list[Any]:
    """One of each prompt, where one may be given for all."""
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * len(prompts)
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts):,} prompts and {len(each):,} {what}; give one for all, or one for each")
    return each


def check_streamed(params: SamplingParams) -> None:
    """Raises RequestError for parameters that ask for more than one completion."""
    if (params.best_of or params.n) > 1 or params.beam_width:
        raise RequestError("a stream is one answer as it is made: leave out n, best_of and beam_width, or do not stream")


def _salt(loaded: LoadedAdapter | None, cache_salt: str | None) -> str | None:
    """What a prompt's keys depend on besides its tokens, and which requests may share them; unique for each pair."""
    return None if loaded is None and cache_salt is None else repr((loaded and loaded.salt, cache_salt))
