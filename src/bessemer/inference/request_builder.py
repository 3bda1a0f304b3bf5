"""Builds the engine's requests from prompts and parameters, and refuses what is known to be wrong beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from bessemer.core.errors import RequestError
from bessemer.inference.adapters import LoadedAdapter
from bessemer.inference.request import LogitsRequest, Request
from bessemer.inference.sampling.beam_search import BeamSearch
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import SamplingState
from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.tokenization.tokenizer import Tokenizer


class RequestBuilder:
    """Makes requests of one model. Any thread may use it."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_tokens: frozenset[int], context_length: int, context_name: str
    ) -> None:
        """context_name: what limits the length, in the words of an error: the model's context, or a setting."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._context_length = context_length
        self._context_name = context_name
        self._names = count()
        self._grammars = GrammarCompiler(tokenizer, vocab_size, end_tokens)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt. Raises RequestError where it has none, one that the model has not, or too many."""
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        if not all(0 <= id < self._vocab_size for id in ids):
            raise RequestError(f"the prompt has a token id outside the vocabulary of {self._vocab_size:,} tokens")
        if len(ids) >= self._context_length:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens and {self._context_name} is {self._context_length:,}, answer included; "
                "shorten the prompt"
            )
        return ids

    def request(
        self, ids: list[int], params: SamplingParams, priority: int, loaded: LoadedAdapter | None, cache_salt: str | None
    ) -> Request:
        """A request for a completion of `prompt_ids`, with the other completions of the same prompt as its `siblings`.

        Raises RequestError for parameters that cannot be served.
        """
        limit = self._limit(ids, params)
        # what is found in the prefix cache has no logits: log-probabilities of a prompt need all of it computed
        alone = None if params.prompt_logprobs is None else f"alone {next(self._names)}"
        salt = alone or _salt(loaded, cache_salt)
        if params.best_of is not None and params.best_of > params.n and params.logprobs is None:
            # by which the completions are ranked
            params = params.with_changes(logprobs=0, logprobs_mode="raw")
        end_tokens = self._ends(params) | frozenset(params.stop_token_ids)
        first, *others = [
            Request(
                self._sequence(ids, limit, priority, salt),
                self._sampling(ids, params, index),
                self._tokenizer,
                end_tokens,
                loaded and loaded.adapter,
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

    def _limit(self, ids: list[int], params: SamplingParams) -> int:
        """The most tokens of prompt and completion together."""
        return min(len(ids) + params.max_tokens, self._context_length)

    def _sequence(self, ids: list[int], limit: int, priority: int, salt: str | None) -> TokenSequence:
        return TokenSequence(next(self._names), list(ids), len(ids), limit, priority, salt)

    def _sampling(self, ids: list[int], params: SamplingParams, index: int) -> SamplingState:
        return SamplingState(
            params,
            prompt=ids,
            vocab_size=self._vocab_size,
            end_tokens=self._ends(params),
            index=index,
            grammar=self._grammars.matcher(params),
        )

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._end_tokens


def _salt(loaded: LoadedAdapter | None, cache_salt: str | None) -> str | None:
    """What a prompt's keys depend on besides its tokens, and which requests may share them; unique for each pair."""
    return None if loaded is None and cache_salt is None else repr((loaded and loaded.salt, cache_salt))
