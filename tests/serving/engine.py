"""An engine of bytes that answers what it is told to: fast, and stoppable at any token."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bessemer.core.errors import BessemerError
from bessemer.inference.config import EngineConfig
from bessemer.inference.request import Chunk, Completion
from bessemer.inference.sampling.sampler import SamplingParams
from bessemer.tokenization.chat import Segment

BOS = 256


class ByteTokenizer:
    """Token = byte, and one for each piece of an answer; a conversation is its contents, a line each."""

    vocab_size = 257
    folder = "bytes"
    chat_template = None
    tool_format = ""
    eos_ids: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def tokens_of(self, piece: str) -> list[int]:
        """The token of a piece of an answer."""
        if piece not in self._pieces:
            self._pieces.append(piece)
        return [self.vocab_size + self._pieces.index(piece)]

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [BOS] * add_bos + list(text.encode())

    def has_more_tokens(self, text: str, limit: int) -> bool:
        return len(text.encode()) > limit

    def control_id(self, token: str) -> None:
        return None

    def shown(self, ids: Iterable[int], skip_special: bool = True) -> list[int]:
        return [id for id in ids if id != BOS]

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < BOS else self._pieces[id - self.vocab_size].encode()

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        return b"".join(map(self.token_bytes, self.shown(ids)))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def render_chat(self, messages: Sequence[Mapping[str, str]], *_, **__) -> list[Segment]:
        return [Segment("".join(f"{message['role']}: {message['content']}\n" for message in messages), False, False)]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False, tools: Sequence | None = None
    ) -> list[int]:
        assert add_generation_prompt and not tools
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))


def echo(prompt: str) -> Iterator[str]:
    """A character at a time, the last line of the prompt."""
    yield from prompt.splitlines()[-1]


@dataclass(eq=False)
class FakeAnswer:
    pieces: Iterator[str]
    tokens_of: Callable[[str], list[int]]
    max_tokens: int
    prompt_tokens: int
    chunks: deque[Chunk] = field(default_factory=deque)
    siblings: list[FakeAnswer] = field(default_factory=list)
    error: BessemerError | None = None
    done: bool = False
    made: list[Chunk] = field(default_factory=list)
    prompt_log_probs: tuple = ()
    cached_tokens: int = 0
    images: None = None

    def go_on(self) -> None:
        """One token, or the end."""
        try:
            piece = next(self.pieces)
        except StopIteration:
            self._take(Chunk("", [], "stop"))
        except BessemerError as error:
            self.error, self.done = error, True
        else:
            self._take(Chunk(piece, self.tokens_of(piece), "length" if len(self.made) + 1 == self.max_tokens else None))

    def _take(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.made.append(chunk)
        self.done = chunk.finish_reason is not None


class FakeEngine:
    """Answers `reply(prompt)`, a piece a step; `stopped` is set when an answer is stopped before its end."""

    def __init__(self, reply: Callable[[str], Iterator[str]] = echo, context_length: int = 128, max_num_seqs: int = 8) -> None:
        self.reply, self.context_length, self.longest, self.max_num_seqs = reply, context_length, context_length, max_num_seqs
        self.tokenizer = ByteTokenizer()
        self.adapters: tuple[str, ...] = ()
        self.seen: list[SamplingParams] = []
        self.salts: list[str | None] = []
        self.priorities: list[int] = []
        self.stopped = threading.Event()
        self.failure: BessemerError | None = None
        self.context_shift = None
        self.config = EngineConfig()
        self.pictures = None
        self.steps = 0
        self._under_way: list[FakeAnswer] = []

    def prepare(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> FakeAnswer:
        assert adapter is None
        self.seen.append(params)
        self.priorities.append(priority)
        self.salts.append(cache_salt)
        text = self.tokenizer.decode(prompt)
        first, *others = (FakeAnswer(self.reply(text), self.tokens_of, params.max_tokens, len(prompt)) for _ in range(params.n))
        first.siblings = others
        return first

    def tokens_of(self, piece: str) -> list[int]:
        """The tokens of a piece of an answer."""
        return self.tokenizer.tokens_of(piece)

    def begin(self, answer: FakeAnswer) -> None:
        self._under_way += [answer, *answer.siblings]

    def step(self) -> None:
        self.steps += 1
        for answer in self._under_way[: self.max_num_seqs]:
            answer.go_on()
        self._under_way = [answer for answer in self._under_way if not answer.done]

    def stop(self, answer: FakeAnswer) -> None:
        for each in (answer, *answer.siblings):
            if each in self._under_way:
                self._under_way.remove(each)
                self.stopped.set()

    def completion(self, answer: FakeAnswer, params: SamplingParams) -> Completion:
        made = [
            Completion(
                "".join(chunk.text for chunk in each.made),
                [token for chunk in each.made for token in chunk.token_ids],
                each.made[-1].finish_reason,
                each.prompt_tokens,
            )
            for each in (answer, *answer.siblings)
        ]
        return replace(made[0], others=tuple(made[1:]))


class ScriptedEngine(FakeEngine):
    """Answers with the given texts, one after the other, in the tokens of a real tokenizer, a character or a tag a step."""

    def __init__(self, tokenizer, *texts: str, context_length: int = 4096) -> None:
        super().__init__(self._next_text, context_length)
        self.tokenizer, self.texts, self.prompts = tokenizer, list(texts), []

    def _next_text(self, prompt: str) -> Iterator[str]:
        self.prompts.append(prompt)
        yield from filter(None, re.split(r"(</?(?:think|tool_call)>)|", self.texts.pop(0)))

    def tokens_of(self, piece: str) -> list[int]:
        control = self.tokenizer.control_id(piece)
        return self.tokenizer.encode(piece, add_bos=False) if control is None else [control]
