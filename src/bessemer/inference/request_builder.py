"""Request builder: prompts and parameters to the engine's requests, beam search included; what is known to be wrong is refused.

Tokens and scores of a beam search are those of `transformers.generate(num_beams=…)` with `early_stopping=False`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from numbers import Integral

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.capture import Capture, Recorder
from bessemer.inference.execution.weights import LoadedAdapter
from bessemer.inference.images import PicturePrompt, RequestImages
from bessemer.inference.request import Completion, CompletionText, LogitsRequest, Prompt, Request
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.params import SamplingParams, WatermarkConfig
from bessemer.inference.sampling.sampler import SamplingState, no_token
from bessemer.inference.scheduling.sequence import TokenSequence, tokens_to_drop
from bessemer.inference.scores import CaptureRequest, ScoreItem, ScoreRequest
from bessemer.model.config import ModelConfig
from bessemer.model.vision.prompts import ImagePrompt, ImageSpan, PictureReader
from bessemer.tokenization.prompts import encode_continuations
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: B beams, V vocabulary, C candidates.


@dataclass(frozen=True)
class Beam:
    """A completion, its end token included; `log_prob` is the sum over its tokens, `score` what it is ranked by."""

    tokens: list[int]
    log_prob: float
    score: float


class BeamSearch:
    """The n best completions of at most `limit` tokens, by the request's `beam_width` and `length_penalty`.

    Until it is `finished`, the caller computes the logits after each of `sequences` and gives them to `advance`; `best` are
    then the completions.

    Each step continues all beams by all tokens and keeps the best by the sum of log-probabilities: those that end, or reach
    the limit, are done with a score of `sum / length ** length_penalty`; the best others go on. It is finished when
    `beam_width` are done and the best one in flight, scored at its present length, is no better than the worst of them.

    Biases and bans are added to the log-probabilities, as in `transformers`. `state` stays as it is.
    """

    def __init__(self, prompt: Sequence[int], state: SamplingState, limit: int) -> None:
        assert state.params.beam_width > 0 and limit > 0, (state.params.beam_width, limit)
        self.finished = False
        #: Of each of `sequences`, which of the step before it continues by its last token; -1 of the prompt.
        self.parents = [-1]
        self._prompt = list(prompt)
        self._state = state
        self.limit = limit
        self._running: list[list[int]] = [[]]
        self._totals_B = torch.zeros(1)
        self._done: list[Beam] = []

    @property
    def sequences(self) -> list[list[int]]:
        """The beams in flight, prompt included; at first the prompt alone."""
        return [[*self._prompt, *tokens] for tokens in self._running]

    @property
    def best(self) -> list[Beam]:
        """The completions that are done, best first, at most n."""
        return self._done[: self._state.params.n]

    def ends(self, beam: Beam) -> bool:
        """Whether a beam ended at an end token, and not at the limit."""
        return self._state.ends(beam.tokens[-1])

    def advance(self, logits_BV: Tensor) -> None:
        """Take one step. logits_BV: float32, after each of `sequences`.

        Raises RequestError when the logits are not finite or nothing may be chosen.
        """
        params, width = self._state.params, self._state.params.beam_width
        length = len(self._running[0]) + 1
        # enough that, whatever ends among them, `width` are left to go on with
        kept = max(2, 1 + len(self._state.end_tokens)) * width
        totals_BV = _log_probs(logits_BV, self._running, self._state) + self._totals_B[:, None]
        vocab_size = totals_BV.shape[-1]
        values_C, places_C = totals_BV.flatten().topk(min(kept, totals_BV.numel()))
        going: list[tuple[int, int, Tensor]] = []
        ranked = zip(places_C.tolist(), values_C, strict=True)
        for rank, (place, total) in enumerate(ranked):
            beam, token = divmod(place, vocab_size)
            if total == -torch.inf:
                break
            if self._state.ends(token) or length == self.limit:
                # an end that is not among the best is none
                if rank < width:
                    score = (total / length**params.length_penalty).item()
                    self._done.append(Beam([*self._running[beam], token], total.item(), score))
            elif len(going) < width:
                going.append((beam, token, total))
        self._done = sorted(self._done, key=lambda beam: -beam.score)[:width]
        if not going:
            self.finished = True
            return
        self._running = [[*self._running[beam], token] for beam, token, _ in going]
        self.parents = [beam for beam, _, _ in going]
        self._totals_B = torch.stack([total for _, _, total in going])
        hoped = (self._totals_B[0] / length**params.length_penalty).item()
        self.finished = len(self._done) == width and hoped <= self._done[-1].score


def _log_probs(logits_BV: Tensor, running: Sequence[list[int]], state: SamplingState) -> Tensor:
    """Log-probabilities of the next token of each beam, with what the request changes."""
    log_probs_BV = logits_BV.detach().float().log_softmax(-1).cpu()
    for beam, tokens in enumerate(running):
        if log_probs_BV[beam].isnan().any():
            raise no_token(logits_BV[beam])
        state.adjust_beam(log_probs_BV[beam].numpy(), len(tokens))
        if (log_probs_BV[beam] == -torch.inf).all() and len(running) == 1:
            raise no_token(log_probs_BV[beam])
    return log_probs_BV


@dataclass(frozen=True)
class ContextShift:
    """How texts that outgrow the context go on: with `capacity` tokens at most, the first `keep` always among them."""

    capacity: int
    keep: int

    def dropped(self, length: int) -> int:
        """How many tokens of a prompt are left out."""
        return tokens_to_drop(length, self.capacity, self.keep)


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
        watermark: WatermarkConfig | None = None,
        pictures: PictureReader | None = None,
    ) -> None:
        """context_name: what limits the length, in the words of an error: the model's context, or a setting. shared: whether
        several processes share the model. watermark: of requests that have none and can carry it. pictures: reads those of
        prompts."""
        self._tokenizer = tokenizer
        self._vocab_size = config.vocab_size
        self._config = config
        self._shared = shared
        self._watermark = watermark
        self._end_tokens = end_tokens
        self._context_length = context_length
        self._context_name = context_name
        self._names = count()
        self._grammars = GrammarCompiler(tokenizer, config.vocab_size, end_tokens)
        #: None where a text ends with the context.
        self.shift: ContextShift | None = None
        #: Reads the pictures of prompts; None for a model that reads none.
        self.pictures = pictures

    def prompt_ids(self, prompt: Prompt, least: int = 1, *, shifts: bool = False) -> list[int]:
        """The tokens of a prompt. least: tokens that must fit behind it. shifts: whether one that is too long is shortened, as
        `shift` says. Raises RequestError where it has none, one that the model has not, or too many."""
        if isinstance(prompt, bytes | bytearray | Mapping):
            raise RequestError(
                f"a prompt is a text or token ids, got {type(prompt).__name__}; decode bytes, and give messages to chat"
            )
        if isinstance(prompt, PicturePrompt):
            raise RequestError("pictures are answered alone: not by beam search, and not where a text is scored or embedded")
        ids = self._encoded(prompt)
        if shifts and self.shift is not None:
            keep = self.shift.keep
            del ids[keep : keep + self.shift.dropped(len(ids))]
        self._check_length(ids, least)
        return ids

    def picture_prompt(self, prompt: PicturePrompt, least: int) -> ImagePrompt:
        """The tokens of a prompt with pictures, as many for each as it has vectors. Raises RequestError as `prompt_ids`, for a
        model that reads none, and for more or fewer pictures than image tokens."""
        if self.pictures is None:
            raise RequestError("this model reads no pictures; leave them out, or take a model that does")
        expanded = self.pictures.expand(self._encoded(prompt.prompt), prompt.pictures)
        self._check_length(expanded.ids, least)
        return expanded

    def _encoded(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        self._check_ids(ids, "the prompt")
        return ids

    def _check_length(self, ids: Sequence[int], least: int) -> None:
        if len(ids) + least > self._context_length:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens and {self._context_name} is {self._context_length:,}, answer included; "
                "shorten the prompt"
            )

    def may_shift(self, params: SamplingParams, capture: Capture | None) -> bool:
        """Whether the text of a request may lose a part: not where something is said of each of its tokens."""
        asks_of_each = capture is not None or params.prompt_logprobs is not None or params.beam_width
        return self.shift is not None and params.max_tokens > 0 and not asks_of_each

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
        spans: Sequence[ImageSpan] = (),
    ) -> Request:
        """A request for a completion of token ids, with the other completions of the same prompt as its `siblings`.

        streams: as in `Request`. spans: pictures among the ids, of `picture_prompt`. Raises RequestError for parameters that
        cannot be served.
        """
        params = self._with_watermark(params)
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
            # `best_of` ranks the completions by their log-probabilities
            params = params.with_changes(logprobs=0, logprobs_mode="raw")
        end_tokens = self._ends(params) | frozenset(params.stop_token_ids)
        requests: list[Request] = []
        images = None
        if spans:
            assert self.pictures is not None
            images = RequestImages(spans, self.pictures.vectors)
        for index in range(params.best_of or params.n):
            sequence = self._sequence(ids, limit, priority, salt, computed_from)
            if images is not None:
                sequence.images = images.marks
            elif self.shift is not None and self.may_shift(params, capture):
                sequence.limit = min(len(ids) + params.max_tokens, self.shift.capacity)
                sequence.overflow = len(ids) + params.max_tokens - sequence.limit
                sequence.keep = min(self.shift.keep, len(ids))
            sampling = self._sampling(ids, params, index, first=requests[0].sampling if requests else None)
            turn_of = images.turn_of if images is not None and images.turns else None
            recorder = None if capture is None else Recorder(capture, len(ids), turn_of)
            adapter = loaded and loaded.adapter
            request = Request(sequence, sampling, self._tokenizer, end_tokens, adapter, recorder, streams=streams)
            request.images = images
            requests.append(request)
        first, *others = requests
        first.siblings = others
        return first

    def _with_watermark(self, params: SamplingParams) -> SamplingParams:
        """The engine's watermark where the request has none and can carry it."""
        mark = self._watermark
        if mark is None or params.watermark is not None or not params.can_carry(mark):
            return params
        return params.with_changes(watermark=mark)

    def beam_search(self, ids: list[int], params: SamplingParams) -> BeamSearch:
        """A beam search from `prompt_ids`. Raises RequestError for parameters that cannot be served."""
        return BeamSearch(ids, self._sampling(ids, params), self._limit(ids, params) - len(ids))

    def beam_completion(self, search: BeamSearch, prompt_tokens: int) -> Completion:
        """The completions of a search that is finished."""
        completions = []
        for beam in search.best:
            text = CompletionText(self._tokenizer)
            ended = search.ends(beam)
            shown = "".join(text.feed(token) for token in beam.tokens[: len(beam.tokens) - ended]) + text.flush()
            completions.append(Completion(shown, beam.tokens, "stop" if ended else "length", prompt_tokens))
        return replace(completions[0], others=tuple(completions[1:]))

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
        self, ids: list[int], limit: int, priority: int, salt: str | None, computed_from: int | None = None
    ) -> TokenSequence:
        return TokenSequence(next(self._names), list(ids), len(ids), limit, priority, salt, computed_from=computed_from)

    def _sampling(
        self, ids: list[int], params: SamplingParams, index: int = 0, first: SamplingState | None = None
    ) -> SamplingState:
        """first: that of the first completion of the prompt, whose rules the others share."""
        return SamplingState(
            params,
            prompt=ids,
            vocab_size=self._vocab_size,
            end_tokens=self._ends(params),
            index=index,
            grammar=self._grammars.matcher(params),
            rules=None if first is None else first.rules,
        )

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._end_tokens


def _salt(loaded: LoadedAdapter | None, cache_salt: str | None) -> str | None:
    """What a prompt's keys depend on besides its tokens, and which requests may share them; unique for each pair."""
    return None if loaded is None and cache_salt is None else repr((loaded and loaded.salt, cache_salt))
