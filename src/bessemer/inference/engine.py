"""The engine: prompts to completions with a key-value cache, one request or a batch, whole or as a stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.config import SamplingParams
from bessemer.inference.sampling import generator_for, sample
from bessemer.inference.stopping import AnswerText
from bessemer.model.cache import DecoderCache
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.folder import load_model, read_end_tokens
from bessemer.tokenization.chat import Message, Tool
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

# Shapes: B batch, T time, V vocabulary, D hidden.

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """What one step adds to an answer. `text` may be empty while a character or a possible stop string is incomplete."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `text` ends before a stop string and shows no control token; `token_ids` holds all that was made.

    finish_reason: `stop` at an end token or a stop string, `length` at max_tokens or the end of the context.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        """Tokens made, an end token included."""
        return len(self.token_ids)


class _Request:
    """An answer under way."""

    def __init__(self, prompt: list[int], params: SamplingParams, limit: int, tokenizer: Tokenizer) -> None:
        self.prompt, self.limit = prompt, limit
        self.generator = generator_for(params)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._text = AnswerText(tokenizer, params.stop)

    def take(self, token: int, end_tokens: frozenset[int]) -> Chunk:
        """Add a token to the answer."""
        self.token_ids.append(token)
        ended = token in end_tokens
        text = "" if ended else self._text.feed(token)
        if ended or self._text.stopped or len(self.token_ids) == self.limit:
            text += self._text.flush()
            # the flush may complete a stop string
            self.finish_reason = "stop" if ended or self._text.stopped else "length"
        return Chunk(text, [token], self.finish_reason)


class Engine:
    """Generates text with a model.

    The weights are only read and every call has a cache of its own, so calls from several threads, and streams that
    take turns on one, do not disturb each other. A stream that is closed early frees its cache.
    """

    def __init__(
        self,
        model: Path | str | Decoder,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        """Open a model folder, or use a model in memory with its tokenizer (where it lies: `device` is for folders).

        batch_size: prompts of one `generate` call that are computed at once.
        Raises ArtefactError when the folder is damaged, ConfigError when the device is not on this machine.
        """
        if isinstance(model, Decoder):
            assert tokenizer is not None, "a model in memory needs its tokenizer"
            self.model, self.tokenizer = model, tokenizer
            self._end_tokens = frozenset(tokenizer.eos_ids)
        else:
            self.model = load_model(model, choose_device(device))
            self.tokenizer = tokenizer or load_tokenizer(model)
            self._end_tokens = read_end_tokens(Path(model)) or frozenset(self.tokenizer.eos_ids)
        self.batch_size = batch_size

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.model.config.max_position_embeddings

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Complete every prompt; a text begins with the begin token, token ids are taken as they are.

        Each answer is the one that its prompt gets alone. Raises RequestError for a prompt that leaves no room in the
        context, before any is computed.
        """
        requests = [self._request(prompt, params) for prompt in prompts]
        texts = [""] * len(requests)
        # prompts of similar length together waste the least padding
        by_length = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
        for start in range(0, len(requests), self.batch_size):
            group = by_length[start : start + self.batch_size]
            for row, chunk in self._steps([requests[index] for index in group], params):
                texts[group[row]] += chunk.text
        return [
            Completion(text, request.token_ids, request.finish_reason or "length", len(request.prompt))
            for request, text in zip(requests, texts, strict=True)
        ]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[Chunk, None, None]:
        """Complete a prompt token by token; the last chunk carries the finish reason.

        The chunks' texts joined are `generate`'s. Raises RequestError at once for a prompt that does not fit.
        """
        return self._stream(self._request(prompt, params), params)

    def chat(self, messages: Sequence[Message], params: SamplingParams, tools: Sequence[Tool] | None = None) -> Completion:
        """The assistant's answer to a conversation; with tools it may be a call of one, as the chat template writes it.

        Raises RequestError as `generate`, and for a malformed message or tool.
        """
        return self.generate([self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)], params)[0]

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams, tools: Sequence[Tool] | None = None
    ) -> Generator[Chunk, None, None]:
        """The assistant's answer token by token. Raises RequestError at once, as `chat`."""
        return self.stream(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools), params)

    def _request(self, prompt: Prompt, params: SamplingParams) -> _Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        if not all(0 <= id < self.model.config.vocab_size for id in ids):
            raise RequestError(f"the prompt has a token id outside the vocabulary of {self.model.config.vocab_size:,} tokens")
        room = self.context_length - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens and the model's context is {self.context_length:,}, "
                "answer included; shorten the prompt"
            )
        return _Request(ids, params, min(params.max_tokens, room), self.tokenizer)

    def _stream(self, request: _Request, params: SamplingParams) -> Generator[Chunk, None, None]:
        for _, chunk in self._steps([request], params):
            yield chunk

    def _steps(self, requests: list[_Request], params: SamplingParams) -> Iterator[tuple[int, Chunk]]:
        """Run requests together to their ends; gives each new chunk with its request's index."""
        end_tokens = frozenset() if params.ignore_eos else self._end_tokens
        cache = self._new_cache(requests)
        logits_BV = self._prefill([request.prompt for request in requests], cache)
        running = list(range(len(requests)))
        while True:
            tokens = sample(logits_BV, params, [requests[index].generator for index in running])
            for index, token in zip(running, tokens, strict=True):
                yield index, requests[index].take(token, end_tokens)
            rows = [row for row, index in enumerate(running) if requests[index].finish_reason is None]
            if not rows:
                return
            if len(rows) < len(running):
                cache.keep(rows)
                running = [running[row] for row in rows]
                tokens = [tokens[row] for row in rows]
            logits_BV = self._decode(tokens, cache)

    def _new_cache(self, requests: list[_Request]) -> DecoderCache:
        # the last token of an answer is never read
        capacity = max(len(request.prompt) + request.limit - 1 for request in requests)
        return DecoderCache(self.model.config, len(requests), capacity, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def _prefill(self, prompts: list[list[int]], cache: DecoderCache) -> Tensor:
        """Read whole prompts into an empty cache, padded on the right; logits of the token after each, (B, V)."""
        lengths = [len(prompt) for prompt in prompts]
        padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
        device = self.model.device
        hidden_BTD = self.model.hidden(torch.tensor(padded, device=device), cache=cache, real=lengths)
        cache.shorten(lengths)
        last_BD = hidden_BTD[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]
        return self.model.logits(last_BD)

    @torch.inference_mode()
    def _decode(self, tokens: list[int], cache: DecoderCache) -> Tensor:
        """Read one more token of every sequence; logits of the next, (B, V)."""
        tokens_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        return self.model(tokens_B1, cache=cache)[:, -1]
