"""An engine of bytes that answers what it is told to: fast, and stoppable at any token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from bessemer.inference.engine import Chunk
from bessemer.inference.sampling import SamplingParams

BOS = 256


class ByteTokenizer:
    """Token = byte; a conversation is its contents, a line each."""

    vocab_size = 257

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [BOS] * add_bos + list(text.encode())

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[int]:
        assert add_generation_prompt
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))


def echo(prompt: str) -> Iterator[str]:
    """A character at a time, the last line of the prompt."""
    yield from prompt.splitlines()[-1]


class FakeEngine:
    """Streams `reply(prompt)`; `closed` is set when a stream ends or is closed, whatever the reason."""

    def __init__(self, reply: Callable[[str], Iterator[str]] = echo, context_length: int = 128) -> None:
        self.reply, self.context_length = reply, context_length
        self.tokenizer = ByteTokenizer()
        self.seen: list[SamplingParams] = []
        self.closed = threading.Event()

    def stream(self, prompt: list[int], params: SamplingParams) -> Generator[Chunk, None, None]:
        self.seen.append(params)
        try:
            text = bytes(token for token in prompt if token != BOS).decode()
            for count, piece in enumerate(self.reply(text), start=1):
                yield Chunk(piece, [0], "length" if count == params.max_tokens else None)
                if count == params.max_tokens:
                    return
            yield Chunk("", [], "stop")
        finally:
            self.closed.set()
