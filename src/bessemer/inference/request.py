"""Requests of the engine core, and what a caller gets of them: chunks of a completion as it grows, and whole completions."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.images import PicturePrompt, RequestImages
from bessemer.inference.sampling.distribution import log_probs
from bessemer.inference.sampling.params import SamplingParams, StopStrings
from bessemer.inference.sampling.sampler import Sampled, SamplingState
from bessemer.inference.scheduling.sequence import ScheduledChunk, TokenSequence
from bessemer.model.adapters import Adapter
from bessemer.tokenization.prompts import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bessemer.inference.capture import Captured, Recorder

# Shapes: R wanted rows of a chunk, V vocabulary.

#: Ends the sequence of a request that samples nothing; it is never read.
_PLACEHOLDER = 0

#: A text, or token ids; or either with pictures.
Prompt = str | Sequence[int] | PicturePrompt
#: What a method that takes many prompts is given: a prompt alone is one prompt, never a list of letters or ids.
Prompts = Prompt | Sequence[Prompt]


class PromptCall(NamedTuple):
    """One prompt of a call for many, with its own parameters and the name of its adapter."""

    prompt: Prompt
    params: SamplingParams
    adapter: str | None


def prompt_calls(
    prompts: Prompts, params: SamplingParams | Sequence[SamplingParams], adapter: str | Sequence[str | None] | None
) -> list[PromptCall]:
    """Each prompt with its parameters and adapter, which are given for all or for each. Raises RequestError as `for_each`."""
    listed = as_prompts(prompts)
    each, adapters = for_each(len(listed), params, "params"), for_each(len(listed), adapter, "adapters")
    return [PromptCall(*call) for call in zip(listed, each, adapters, strict=True)]


def as_prompts(prompts: Prompts) -> list[Prompt]:
    """The prompts that are meant: a text, or token ids, alone are one prompt."""
    if isinstance(prompts, str | bytes | bytearray | Mapping | PicturePrompt):
        return [prompts]  # type: ignore[list-item]  # what is no prompt, `RequestBuilder.prompt_ids` refuses
    if len(prompts) and (isinstance(prompts[0], Integral) or getattr(prompts[0], "ndim", None) == 0):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def for_each(count: int, values: Any, what: str) -> list[Any]:
    """A value for each of `count` prompts, where one may be given for all. Raises RequestError for another number of them."""
    each = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values] * count
    if len(each) != count:
        raise RequestError(f"{count:,} prompts and {len(each):,} {what}; give one for all, or one for each")
    return each


def check_streamed(params: SamplingParams) -> None:
    """Raises RequestError for parameters that ask for more than one completion."""
    if (params.best_of or params.n) > 1 or params.beam_width:
        raise RequestError("a stream is one answer as it is made: leave out n, best_of and beam_width, or do not stream")


@dataclass(frozen=True)
class Chunk:
    """What one step adds to a completion. `text` may be empty while a character or a possible stop string is incomplete.

    log_probs: of each token; None where the request wants none.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    log_probs: list[Sampled] | None = None


@dataclass(frozen=True)
class Completion:
    """A whole completion. `text` ends before a stop string and shows no control token; `token_ids` holds every token made.

    finish_reason: `stop` at an end token or a stop string, `length` at max_tokens or the end of the context.
    log_probs: of each token made; prompt_log_probs: of each token of the prompt but the first; None where not wanted. others:
    the other completions of the same prompt. cached_tokens: of the prompt, found in the prefix cache.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    log_probs: list[Sampled] | None = None
    prompt_log_probs: list[Sampled] | None = None
    others: tuple[Completion, ...] = ()
    cached_tokens: int = field(default=0, compare=False)
    captured: Captured | None = field(default=None, compare=False)

    @property
    def completion_tokens(self) -> int:
        """Tokens made, an end token included."""
        return len(self.token_ids)


class CompletionText:
    """Token ids to the text that may be shown: whole characters, no control tokens, nothing from a stop string on.

    No stop string ends in the text of the first `min_tokens` tokens; it may begin there.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._decoder = StreamingDecoder(tokenizer)
        self._stops = StopStrings(stops, include_stop) if stops else None
        self._min_tokens = min_tokens
        self._fed = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops is not None and self._stops.found

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        self._fed += 1
        text = self._decoder.feed([token])
        return text if self._stops is None else self._stops.feed(text, search=self._fed > self._min_tokens)

    def flush(self) -> str:
        """The text held back, when no more tokens come."""
        text = self._decoder.flush()
        if self._stops is None:
            return text
        return self._stops.feed(text, search=self._fed > self._min_tokens) + self._stops.flush()


class WholeText(CompletionText):
    """A `CompletionText` without stop strings that decodes all tokens at `flush`: cheaper than one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._tokens: list[int] = []

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def flush(self) -> str:
        tokens, self._tokens = self._tokens, []
        return self._decoder.feed(tokens) + super().flush()


class ScheduledRequest:
    """What the engine core needs of every request: its sequence, its adapter, the logits that it wants, and how it ended.

    A kind of request says by `wanted_rows` which logits of a chunk it wants. Those that no token is sampled from are given to
    its `take_logits`. One that samples nothing ends with its sequence, whose limit is a token behind those that it reads.
    """

    #: Whether tokens are sampled, from the last `num_logits` rows of each chunk.
    samples = False
    #: Whether its reader takes what each step gives, and does not wait for the end.
    streams = True

    def __init__(self, sequence: TokenSequence, adapter: Adapter | None = None, recorder: Recorder | None = None) -> None:
        """recorder: of what is captured of its tokens."""
        self.sequence = sequence
        self.adapter = adapter
        self.recorder = recorder
        #: The pictures of its prompt; None where it has none.
        self.images: RequestImages | None = None
        self.error: BessemerError | None = None
        #: When it was given to the engine core, its first step began, and its first and last tokens came, on
        #: `time.perf_counter`; 0 before.
        self.began_at = self.scheduled_at = 0.0
        self.first_token_at = self.last_token_at = 0.0
        #: Other requests of the same prompt, which start when it has been read.
        self.siblings: Sequence[ScheduledRequest] = []

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None

    @property
    def ended(self) -> bool:
        """Whether its sequence is computed no further."""
        return self.done

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        """Which tokens of a chunk, counted from 0, it wants the logits of: those that a token follows, to be sampled."""
        return range(chunk.count - chunk.num_logits, chunk.count)

    def take_logits(self, chunk: ScheduledChunk, logits_RV: Tensor) -> None:
        """Take the logits of the `wanted_rows` of a chunk that was computed. The tensor is not the request's to keep.

        Raises RequestError where they are of no use: the request ends with it.
        """

    def take(self, sampled: list[Sampled], weight_version: int = 0) -> list[int]:
        """Take the tokens sampled in a step. Returns the ids that its sequence is extended by."""
        return [_PLACEHOLDER]

    def successors(self, places: int) -> Sequence[ScheduledRequest]:
        """When its sequence has ended without an error: requests of the same prompt to take its place, at most `places`."""
        return ()

    def fail(self, error: BessemerError) -> None:
        """End with an error, which its reader gets."""
        self.error = error


class LogitsRequest(ScheduledRequest):
    """Asks for the logits after its tokens, and for no token. Beam search is made of these.

    logits_V: float32, once it is done.
    """

    logits_V: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.logits_V is not None or self.error is not None

    def take_logits(self, chunk: ScheduledChunk, logits_RV: Tensor) -> None:
        self.logits_V = logits_RV[-1].clone()


class Request(ScheduledRequest):
    """Asks for a completion: its sequence, how its tokens are sampled, and the chunks that its reader has not taken yet.

    With `max_tokens` 0 its prompt is read and nothing is sampled; it ends with one chunk, which is empty.
    """

    siblings: Sequence[Request]

    def __init__(
        self,
        sequence: TokenSequence,
        sampling: SamplingState,
        tokenizer: Tokenizer,
        end_tokens: frozenset[int],
        adapter: Adapter | None = None,
        recorder: Recorder | None = None,
        *,
        streams: bool = True,
    ) -> None:
        """end_tokens: at which it ends, the request's own stop tokens among them. recorder: of what is captured. streams: False
        where its reader waits for the end: then one chunk holds all, and its text is decoded at once."""
        super().__init__(sequence, adapter, recorder)
        self.sampling = sampling
        self.samples = self.params.max_tokens > 0
        #: Tokens of the prompt.
        self.prompt_tokens = sequence.prompt_length
        #: Tokens made so far.
        self.token_ids: list[int] = []
        self.chunks: deque[Chunk] = deque()
        self.finish_reason: str | None = None
        self.prompt_log_probs: list[Sampled] = []
        #: Of each token made, the version of the weights that it was sampled with.
        self.weight_versions: list[int] = []
        #: Whether log-probabilities of its prompt are wanted.
        self.reads_prompt = self.params.prompt_logprobs is not None
        self._end_tokens = end_tokens
        self.streams = streams
        self._text = (
            CompletionText(tokenizer, self.params.stop, self.params.include_stop, self.params.min_tokens)
            if streams or self.params.stop
            else WholeText(tokenizer)
        )
        #: Text and tokens of the next chunk.
        self._next_text = ""
        self._next_tokens: list[Sampled] = []

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.sampling.params

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def captured(self) -> Captured | None:
        """What was captured so far; of the last token, which is not computed, nothing."""
        return None if self.recorder is None else self.recorder.captured(len(self.sequence.tokens) - 1)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt found in the prefix cache."""
        return self.sequence.cached

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        # log-probabilities of the prompt need the logits of all its tokens
        if self.reads_prompt and max(chunk.start, len(self.prompt_log_probs)) < self.prompt_tokens - 1:
            return range(chunk.count)
        return super().wanted_rows(chunk) if self.samples else range(0)

    def take_logits(self, chunk: ScheduledChunk, logits_RV: Tensor) -> None:
        """Add log-probabilities of the prompt's tokens; those computed again after a preemption only once."""
        first = max(chunk.start, len(self.prompt_log_probs))
        end = min(chunk.start + chunk.count, self.prompt_tokens - 1)
        following = self.sequence.tokens[first + 1 : end + 1]
        counts = [self.params.prompt_logprobs or 0] * len(following)
        of_tokens = log_probs(logits_RV[first - chunk.start : end - chunk.start], following, counts)
        self.prompt_log_probs += [Sampled(token, one) for token, one in zip(following, of_tokens, strict=True)]

    def take(self, sampled: list[Sampled], weight_version: int = 0) -> list[int]:
        """Add the tokens of a step up to the end of the completion. Returns the ids of those that belong to it.

        weight_version: of the weights that they were sampled with. The request is done after its last chunk is there: another
        thread may be looking.
        """
        if not self.samples:
            self.chunks.append(Chunk("", [], "length", [] if self.params.logprobs is not None else None))
            self.finish_reason = "length"
            return super().take(sampled)
        finish_reason = None
        places = self.sequence.limit - len(self.sequence.tokens)
        text, taken = "", []
        for one in sampled:
            taken.append(one)
            ended = one.token in self._end_tokens
            text += "" if ended else self._text.feed(one.token)
            stopped = ended or self._text.stopped or (one is sampled[-1] and self.sampling.finished)
            if stopped or (len(taken) == places and not self.sequence.overflow):
                text += self._text.flush()
                # the flush may complete a stop string
                finish_reason = "stop" if stopped or self._text.stopped else "length"
                break
        ids = [one.token for one in taken]
        self.token_ids += ids
        self.weight_versions += [weight_version] * len(ids)
        self._next_text += text
        self._next_tokens += taken
        if self.streams or finish_reason is not None:
            tokens = self._next_tokens
            log_probs = tokens if self.params.logprobs is not None else None
            self.chunks.append(Chunk(self._next_text, [one.token for one in tokens], finish_reason, log_probs))
            self._next_text, self._next_tokens = "", []
        self.finish_reason = finish_reason
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
    return replace(
        made[0], prompt_log_probs=prompt, others=tuple(made[1:]), cached_tokens=request.cached_tokens, captured=request.captured
    )


def _whole(request: Request) -> Completion:
    chunks = request.drain()
    assert request.finish_reason is not None
    log_probs = None if request.params.logprobs is None else [one for chunk in chunks for one in chunk.log_probs or []]
    text = "".join(chunk.text for chunk in chunks)
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    return Completion(text, token_ids, request.finish_reason, request.prompt_tokens, log_probs)


def _mean_log_prob(completion: Completion) -> float:
    assert completion.log_probs, "completions that are ranked have log-probabilities"
    return sum(one.log_probs.token for one in completion.log_probs if one.log_probs) / len(completion.log_probs)
