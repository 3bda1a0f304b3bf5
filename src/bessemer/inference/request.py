"""Requests of the engine core, and what a caller gets of them: chunks of a completion as it grows, and whole completions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import Sampled, SamplingState
from bessemer.inference.sampling.stop_strings import StopStrings
from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.model.adapters import Adapter
from bessemer.tokenization.streaming import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: V vocabulary.


@dataclass(frozen=True)
class Chunk:
    """What one step adds to a completion. `text` may be empty while a character or a possible stop string is incomplete.

    log_probs: of each token, where the request asks for them.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    log_probs: list[Sampled] | None = None


@dataclass(frozen=True)
class Completion:
    """A whole completion. `text` ends before a stop string and shows no control token; `token_ids` holds every token made.

    finish_reason: `stop` at an end token or a stop string, `length` at max_tokens or the end of the context.
    log_probs: of each token made, and prompt_log_probs of each token of the prompt but the first, where asked for. others:
    where several completions of a prompt were asked for, all but this first one. cached_tokens: of the prompt, found in the
    prefix cache.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    log_probs: list[Sampled] | None = None
    prompt_log_probs: list[Sampled] | None = None
    others: tuple[Completion, ...] = ()
    cached_tokens: int = field(default=0, compare=False)

    @property
    def completion_tokens(self) -> int:
        """Tokens made, an end token included."""
        return len(self.token_ids)


class CompletionText:
    """Token ids to the text that may be shown: whole characters, no control tokens, nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = StreamingDecoder(tokenizer)
        self._stops = StopStrings(stops, include_stop) if stops else None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops is not None and self._stops.found

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        text = self._decoder.feed([token])
        return text if self._stops is None else self._stops.feed(text)

    def flush(self) -> str:
        """The text held back, when no more tokens come."""
        text = self._decoder.flush()
        return text if self._stops is None else self._stops.feed(text) + self._stops.flush()


class ScheduledRequest:
    """What the engine core needs of every request: its sequence, its adapter, and how it ended."""

    def __init__(self, sequence: TokenSequence, adapter: Adapter | None = None) -> None:
        self.sequence = sequence
        self.adapter = adapter
        self.error: BessemerError | None = None
        #: Other requests of the same prompt, which begin when it has been read.
        self.siblings: list[Request] = []

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None

    def fail(self, error: BessemerError) -> None:
        """End with an error, which the caller is told."""
        self.error = error


class LogitsRequest(ScheduledRequest):
    """Asks for the logits after its tokens, and for no token. Beam search is made of these.

    logits_V: float32, once it is done.
    """

    logits_V: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.logits_V is not None or self.error is not None


class Request(ScheduledRequest):
    """Asks for a completion: its sequence, how its tokens are sampled, and the chunks that its reader has not taken yet."""

    def __init__(
        self,
        sequence: TokenSequence,
        sampling: SamplingState,
        tokenizer: Tokenizer,
        end_tokens: frozenset[int],
        adapter: Adapter | None = None,
    ) -> None:
        """end_tokens: at which it ends, the request's own stop tokens among them."""
        super().__init__(sequence, adapter)
        self.sampling = sampling
        self.chunks: deque[Chunk] = deque()
        self.finish_reason: str | None = None
        self.prompt_log_probs: list[Sampled] = []
        #: Of each token made, the version of the weights that it was sampled with.
        self.weight_versions: list[int] = []
        #: Draft tokens that were verified.
        self.proposed = 0
        #: Those of them that were accepted.
        self.accepted = 0
        self._end_tokens = end_tokens
        self._text = CompletionText(tokenizer, self.params.stop, self.params.include_stop)

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.sampling.params

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def token_ids(self) -> list[int]:
        """Tokens made so far."""
        return self.sequence.tokens[self.sequence.prompt_length :]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt found in the prefix cache."""
        return self.sequence.cached

    def take(self, sampled: list[Sampled], weight_version: int = 0) -> list[int]:
        """Add the tokens of a step up to the end of the completion. Returns the ids of those that belong to it.

        weight_version: of the weights that they were sampled with.
        """
        made = len(self.sequence.tokens) - self.sequence.prompt_length
        text, taken = "", []
        for one in sampled:
            taken.append(one)
            made += 1
            ended = one.token in self._end_tokens
            text += "" if ended else self._text.feed(one.token)
            stopped = ended or self._text.stopped or (one is sampled[-1] and self.sampling.finished)
            if stopped or self.sequence.prompt_length + made == self.sequence.limit:
                text += self._text.flush()
                # the flush may complete a stop string
                self.finish_reason = "stop" if stopped or self._text.stopped else "length"
                break
        ids = [one.token for one in taken]
        self.weight_versions += [weight_version] * len(ids)
        log_probs = taken if self.params.logprobs is not None else None
        self.chunks.append(Chunk(text, ids, self.finish_reason, log_probs))
        return ids

    def drain(self) -> list[Chunk]:
        """Chunks that came since the last call. Raises the request's error when there is one."""
        if self.error is not None:
            raise self.error
        chunks = list(self.chunks)
        self.chunks.clear()
        return chunks


def completion_of(request: Request, params: SamplingParams) -> Completion:
    """The completion of a request that is done, with its siblings', as `params` asks for it: of more than n the likeliest.

    Takes the requests' chunks. Raises a request's error when there is one.
    """
    made = [_whole(each) for each in (request, *request.siblings)]
    if len(made) > params.n:
        made = sorted(made, key=_mean_log_prob, reverse=True)[: params.n]
    if params.logprobs is None:
        made = [replace(each, log_probs=None) for each in made]
    prompt = request.prompt_log_probs if params.prompt_logprobs is not None else None
    return replace(made[0], prompt_log_probs=prompt, others=tuple(made[1:]), cached_tokens=request.cached_tokens)


def _whole(request: Request) -> Completion:
    chunks = request.drain()
    assert request.finish_reason is not None
    log_probs = None if request.params.logprobs is None else [one for chunk in chunks for one in chunk.log_probs or []]
    text = "".join(chunk.text for chunk in chunks)
    return Completion(text, request.token_ids, request.finish_reason, request.sequence.prompt_length, log_probs)


def _mean_log_prob(completion: Completion) -> float:
    assert completion.log_probs, "completions that are ranked have log-probabilities"
    return sum(one.log_probs.token for one in completion.log_probs if one.log_probs) / len(completion.log_probs)
