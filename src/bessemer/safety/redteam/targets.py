"""Targets of a red team: a model on this machine, in batches, or one behind an OpenAI-compatible URL.

Guards are the server's: a URL is attacked with whatever stands before its model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bessemer.core.chat_client import ChatClient, FilteredText, with_json_arguments
from bessemer.core.errors import RequestError
from bessemer.core.http_client import ApiError, HttpClient, TransientError

if TYPE_CHECKING:
    from bessemer.inference.engine import Engine
    from bessemer.model.decoder import Decoder
    from bessemer.tokenization.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

#: Status codes by which an API refuses one request and not the caller: malformed or filtered, too long, unprocessable, legal.
_OF_THE_REQUEST = (400, 413, 422, 451)


@dataclass(frozen=True)
class Reply:
    """An answer to a conversation. blocked: the server refused the request (a guard, a filter); error: why none was made;
    is_filtered: the server ended the answer for what it says, and may have put words of its own in its place."""

    text: str = ""
    blocked: str = ""
    error: str = ""
    is_filtered: bool = False


@dataclass(frozen=True)
class Asked:
    """A conversation for a target, with its tools, and how the answer is sampled."""

    messages: Messages
    seed: int
    tools: Sequence[Mapping[str, Any]] = ()
    temperature: float | None = None


class Target(Protocol):
    """A model under attack."""

    #: Attempts that wait for it at once.
    at_once: int

    def ask(self, asked: Sequence[Asked]) -> Iterable[tuple[int, Reply]]:
        """The number of each conversation and its reply, as they come. Raises ApiError where none can be had, such as for a
        wrong key, after the replies that came before."""

    def white_box(self) -> tuple[Decoder, Tokenizer] | None:
        """The model itself with weights that have gradients, and its tokenizer; None where there is no access."""


class EngineTarget:
    """A model on an engine of this machine. open_weights: opens the same model for attacks that read gradients."""

    at_once = 64
    #: Conversations of a call of the engine: an interruption loses one call.
    _calls_of = 16

    def __init__(
        self,
        engine: Engine,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        open_weights: Callable[[], Decoder] | None = None,
    ) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._open_weights = open_weights
        self._opened: Decoder | None = None

    def ask(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Reply]]:
        from bessemer.inference.sampling.params import SamplingParams

        prompts, params, places = [], [], []
        for place, one in enumerate(asked):
            try:
                ids = self._engine.tokenizer.apply_chat_template(
                    one.messages, add_generation_prompt=True, tools=list(one.tools) or None
                )
            except RequestError as error:
                yield place, Reply(error=f"the chat template: {error}")
                continue
            if len(ids) + min(self._max_tokens, 16) > self._engine.longest:
                yield place, Reply(error=f"the prompt of {len(ids):,} tokens does not fit {self._engine.longest:,}")
                continue
            temperature = self._temperature if one.temperature is None else one.temperature
            prompts.append(ids)
            params.append(SamplingParams(max_tokens=self._max_tokens, temperature=temperature, seed=one.seed))
            places.append(place)
        for first in range(0, len(prompts), self._calls_of):
            call = slice(first, first + self._calls_of)
            for place, completion in zip(places[call], self._engine.generate(prompts[call], params[call]), strict=True):
                yield place, Reply(completion.text)

    def white_box(self) -> tuple[Decoder, Tokenizer] | None:
        if self._opened is None and self._open_weights is not None:
            self._opened = self._open_weights()
        return None if self._opened is None else (self._opened, self._engine.tokenizer)


class UrlTarget:
    """A model at a URL. A request that the server refuses for what it says is `blocked`; any other failure ends the run."""

    at_once = 16

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "",
        max_tokens: int,
        temperature: float = 0.0,
        timeout: float = 120.0,
        workers: int = 4,
    ) -> None:
        """Raises ConfigError as `ChatClient`."""
        self._temperature = temperature
        self._workers = workers
        self._open = lambda at: ChatClient(
            url, model, key_variable=key_variable, max_tokens=max_tokens, temperature=at, timeout=timeout, workers=1
        )
        self._clients = {temperature: self._open(temperature)}

    def ask(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Reply]]:
        for one in asked:
            if one.temperature is not None and one.temperature not in self._clients:
                self._clients[one.temperature] = self._open(one.temperature)
        failure: ApiError | None = None
        with ThreadPoolExecutor(self._workers) as pool:
            places = {pool.submit(self._reply, one): place for place, one in enumerate(asked)}
            try:
                for done in as_completed(places):
                    try:
                        yield places[done], done.result()
                    except ApiError as error:
                        # requests under way are waited for, others are not sent
                        failure = failure or error
                        _cancel(places)
                    except CancelledError:
                        continue
            finally:
                _cancel(places)
        if failure is not None:
            raise failure

    def white_box(self) -> None:
        return None

    def _reply(self, one: Asked) -> Reply:
        client = self._clients[self._temperature if one.temperature is None else one.temperature]
        try:
            if not one.tools:
                (text,) = client.ask([list(one.messages)], [one.seed])
                return Reply(str(text), is_filtered=isinstance(text, FilteredText))
            choice = client.answer(with_json_arguments(one.messages), one.tools)
        except ApiError as error:
            if error.status not in _OF_THE_REQUEST:
                raise
            return Reply(blocked=str(error))
        message, is_filtered = choice["message"], choice.get("finish_reason") == "content_filter"
        said = message.get("content") if isinstance(message.get("content"), str) else ""
        calls = message.get("tool_calls") or ()
        written = [said, *(json.dumps(call, ensure_ascii=False) for call in calls)]
        return Reply("\n".join(filter(None, written)), is_filtered=is_filtered)


def _cancel(futures: Iterable[Future[Reply]]) -> None:
    for future in futures:
        future.cancel()


def first_model(url: str, key_variable: str = "") -> str:
    """The first model that an API lists. Raises ConfigError for a URL that is none, ApiError where it lists none."""
    try:
        listed = HttpClient(url, key_variable=key_variable).get("/models")
    except TransientError as error:
        raise ApiError(f"{url}: {error}") from None
    try:
        return str(listed["data"][0]["id"])
    except (LookupError, TypeError):
        raise ApiError(f"{url}: lists no model; name it with --model-name") from None


def is_url(name: str) -> bool:
    """Whether a target, attacker or judge is named by a URL."""
    return name.startswith(("http://", "https://"))


def plain_weights(place: Path, device: str) -> Decoder:
    """A model in float32 with gradients of its inputs, for attacks on weights; quantised weights are decoded.

    place: a model's folder, or a GGUF file. Raises ArtefactError as `load_model`.
    """
    from tempfile import TemporaryDirectory

    import torch

    from bessemer.model.device import choose_device
    from bessemer.model.storage.folder import load_model

    chosen = choose_device(device)
    if place.is_file():
        from bessemer.model.formats.gguf_import import import_gguf

        with TemporaryDirectory(prefix="bessemer-") as scratch:
            import_gguf(place, Path(scratch) / "model")
            model = load_model(Path(scratch) / "model", chosen, torch.float32)
    else:
        model = load_model(place, chosen, torch.float32)
    return model.requires_grad_(False).eval()
