"""What a caller gets: chunks of an answer as it grows, and whole completions."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import Sampled, SamplingState
from bessemer.inference.sampling.stop_strings import AnswerText
from bessemer.inference.scheduling.sequence import TokenSequence
from bessemer.model.adapters import Adapter
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """What one step adds to an answer. `text` may be empty while a character or a possible stop string is incomplete.

    log_probs: of each token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    log_probs: list[Sampled] | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `text` ends before a stop string and shows no control token; `token_ids` holds all that was made.

    finish_reason: `stop` at an end token or a stop string, `length` at max_tokens or the end of the context.
    log_probs: of each token made, and prompt_log_probs of each token of the prompt but the first, where asked for. others:
    where several answers to a prompt were asked for, all but this first one. cached_tokens: of the prompt, found in pages.
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


class Request:
    """An answer under way: its sequence, how its tokens are chosen, and what its reader has not taken yet."""

    def __init__(
        self,
        sequence: TokenSequence,
        sampling: SamplingState,
        tokenizer: Tokenizer,
        end_tokens: frozenset[int],
        adapter: Adapter | None = None,
    ) -> None:
        """end_tokens: at which it ends, those that the request names among them."""
        self.sequence, self.sampling, self.adapter = sequence, sampling, adapter
        self.chunks: deque[Chunk] = deque()
        self.finish_reason: str | None = None
        self.error: BessemerError | None = None
        #: Other answers to the same prompt, which begin when it has been read.
        self.siblings: list[Request] = []
        self.prompt_log_probs: list[Sampled] = []
        #: Asked for the logits after its prompt, and for no token.
        self.is_probe = False
        self.logits_V: Tensor | None = None
        #: Guesses that were checked, and those that came true.
        self.guessed = self.right = 0
        self._end_tokens = end_tokens
        self._text = AnswerText(tokenizer, self.params.stop, self.params.include_stop)

    @property
    def params(self) -> SamplingParams:
        """What was asked."""
        return self.sampling.params

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def token_ids(self) -> list[int]:
        """What was made so far."""
        return self.sequence.tokens[self.sequence.prompt_length :]

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, those found in pages."""
        return self.sequence.cached

    def take(self, found: list[Sampled]) -> list[int]:
        """Add the tokens of a step, as far as the answer goes; the ids of those that belong to it."""
        made = len(self.sequence.tokens) - self.sequence.prompt_length
        text, taken = "", []
        for one in found:
            taken.append(one)
            made += 1
            ended = one.token in self._end_tokens
            text += "" if ended else self._text.feed(one.token)
            stopped = ended or self._text.stopped or (one is found[-1] and self.sampling.finished)
            if stopped or self.sequence.prompt_length + made == self.sequence.limit:
                text += self._text.flush()
                # the flush may complete a stop string
                self.finish_reason = "stop" if stopped or self._text.stopped else "length"
                break
        ids = [one.token for one in taken]
        log_probs = taken if self.params.logprobs is not None else None
        self.chunks.append(Chunk(text, ids, self.finish_reason, log_probs))
        return ids

    def fail(self, error: BessemerError) -> None:
        """End without an answer: whoever waits for it is told."""
        self.error = error

    def drain(self) -> list[Chunk]:
        """What came since it was last asked. Raises the answer's error when there is one."""
        if self.error is not None:
            raise self.error
        chunks = list(self.chunks)
        self.chunks.clear()
        return chunks
