"""Load test of any server with OpenAI's API: `bessemer bench serve`.

Requests arrive in a closed loop of clients or by a Poisson process; each is streamed, and the times of its parts are taken. The
figures have the keys of `vllm bench serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import httpx
import numpy as np
from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import BessemerError, SourceError
from bessemer.core.progress import Progress, Silent, Task

#: What a limit of `goodput` may be on.
GOALS = ("ttft", "tpot", "e2el")


class LoadConfig(Config):
    """A load test: its requests, their arrival, and the limits of goodput."""

    model: str | None = setting(None, "name of the model; the first that the server lists")
    api: Literal["completions", "chat"] = setting("completions", "API that is asked: completions, or chat")
    requests: int = setting(100, "requests that are measured", ge=1)
    warmup: int = setting(2, "requests before them that are not", ge=0)
    concurrency: int | None = setting(
        None, "clients, each of which asks again when it has its answer; with rate the most at once", ge=1
    )
    rate: float | None = setting(
        None, "requests a second that arrive whether or not others are answered", unit="requests/s", gt=0
    )
    burstiness: float = setting(1.0, "shape of the gamma distribution of arrivals: 1 is Poisson, below it bursts come", gt=0)
    input_tokens: int = setting(256, "words of a prompt, about as many tokens", unit="words", ge=1)
    output_tokens: int = setting(128, "most tokens of an answer", unit="tokens", ge=1)
    prompts: Path | None = setting(
        None, "file of prompts instead, JSON lines of {prompt}, a text or token ids, or of {messages}; taken in turn"
    )
    ignore_eos: bool = setting(True, "ask for answers of exactly that length, as vLLM, llama.cpp and Bessemer give them")
    temperature: float = setting(0.0, "temperature of sampling", ge=0)
    top_p: float | None = setting(None, "nucleus of sampling", gt=0, le=1)
    extra_body: dict[str, Any] = setting(
        default_factory=dict, description="fields of the request beside these, as a server's own sampling settings"
    )
    seed: int = setting(0, "seed of prompts and arrivals")
    goodput: dict[str, float] = setting(
        default_factory=dict, description="limits that an answer must all meet to be good, by ttft, tpot or e2el", unit="ms"
    )
    timeout: float = setting(600.0, "time for an answer", unit="s", gt=0)

    @field_validator("goodput")
    @classmethod
    def _check_goals(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, limit in limits.items():
            if name not in GOALS or not limit > 0:
                raise ValueError(f"goodput {name}:{limit:g}: it is {', '.join(GOALS)} and milliseconds, as ttft:200")
        return limits

    @model_validator(mode="after")
    def _check_arrivals(self) -> Self:
        if self.concurrency is None and self.rate is None:
            raise ValueError("give concurrency, for clients that wait for their answers, or rate, for requests that arrive")
        return self


#: Common words: with the space before them, nearly every vocabulary has each as one token.
_TEXT = (
    "the of and to in is that for it was on are as with they be at one have this from by hot word but what some we can out "
    "other were all there when up use your how said an each she which do their time if will way about many then them write "
    "would like so these her long make thing see him two has look more day could go come did number sound no most people my "
    "over know water than call first who may down side been now find any new work part take get place made live where after "
    "back little only round man year came show every good me give our under name very through just form sentence great "
    "think say help low line differ turn cause much mean before move right boy old too same tell does set three want air "
    "well also play small end put home read hand port large spell add even land here must big high such follow act why ask "
    "men change went light kind off need house picture try us again animal point mother world near build self earth father"
)


def bodies(config: LoadConfig, model: str) -> Iterator[dict[str, Any]]:
    """An endless series of request bodies, the same for the same settings. Raises SourceError for a file without prompts."""
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": config.output_tokens,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.top_p is not None:
        common["top_p"] = config.top_p
    if config.ignore_eos:
        common["ignore_eos"] = True
    common |= config.extra_body
    for prompt in _prompts(config):
        yield {**common, **_in_api(prompt, config)}


def _prompts(config: LoadConfig) -> Iterator[dict[str, Any]]:
    if config.prompts is not None:
        yield from itertools.cycle(_read_prompts(config.prompts))
    generator, common = random.Random(config.seed), _TEXT.split()
    while True:
        # a random first word: no prompt finds another's prefix in the cache
        words = [str(generator.randrange(10**6)), *generator.choices(common, k=max(0, config.input_tokens - 1))]
        yield {"prompt": " ".join(words)}


def _in_api(prompt: dict[str, Any], config: LoadConfig) -> dict[str, Any]:
    if config.api == "completions":
        if "prompt" not in prompt:
            raise SourceError(f"{config.prompts}: conversations are for the API chat")
        return {"prompt": prompt["prompt"]}
    return {"messages": prompt["messages"] if "messages" in prompt else [{"role": "user", "content": prompt["prompt"]}]}


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
            raise SourceError(f"{path}, line {number}: a row has a prompt or messages")
        prompts.append(row)
    if not prompts:
        raise SourceError(f"{path}: there is no prompt in it")
    return prompts


def waits(config: LoadConfig) -> Iterator[float]:
    """Seconds between arrivals: gamma distributed with mean 1/rate; 0 without a rate."""
    generator = random.Random(config.seed + 1)
    while True:
        yield 0.0 if config.rate is None else generator.gammavariate(config.burstiness, 1 / (config.rate * config.burstiness))


_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass
class TimedResponse:
    """The times of a streamed response, in seconds of one clock, and its tokens.

    first: of the first text of the answer, thinking or a call. gaps: between later parts. tokens: the server's count; the
    number of parts where it gives none.
    """

    started: float
    first: float | None = None
    ended: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def seconds(self) -> float:
        """From the request to the end of the response."""
        assert self.ended is not None
        return self.ended - self.started

    @property
    def time_to_first_token(self) -> float:
        """From the request to the first text."""
        assert self.first is not None
        return self.first - self.started

    @property
    def time_per_token(self) -> float:
        """Mean time of the tokens after the first; 0 for a single token."""
        return (self.seconds - self.time_to_first_token) / (self.tokens - 1) if self.tokens > 1 else 0.0


async def ask(client: httpx.AsyncClient, api: str, body: dict[str, Any], timeout: float | None = None) -> TimedResponse:
    """Send a request and read its stream to the end. A failure is the result's `error`. timeout: of the whole, in seconds."""
    answer = TimedResponse(time.perf_counter())
    try:
        async with asyncio.timeout(timeout):
            await _read(client, api, body, answer)
    except TimeoutError:
        answer.error = f"not answered in {timeout:g} s"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as error:
        # a server that is no OpenAI server may send anything
        answer.error = str(error) or type(error).__name__
    return answer


async def _read(client: httpx.AsyncClient, api: str, body: dict[str, Any], answer: TimedResponse) -> None:
    parts = 0
    async with client.stream("POST", _PATHS[api], json=body) as response:
        if response.status_code != 200:
            answer.error = f"{response.status_code}: {_reason(await response.aread())}"
            return
        waiting, latest = b"", None
        async for received in response.aiter_raw():
            now = time.perf_counter()
            *events, waiting = (waiting + received).split(b"\n")
            for event in events:
                data = event.removeprefix(b"data:").strip()
                if not event.startswith(b"data:") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    answer.error = _reason(data)
                    return
                if usage := chunk.get("usage"):
                    answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if not _has_text(chunk):
                    continue
                parts += 1
                if latest is None:
                    answer.first = now
                else:
                    answer.gaps.append(now - latest)
                latest = now
    answer.ended = time.perf_counter()
    answer.tokens = answer.tokens or parts
    if answer.first is None and answer.tokens:
        # control tokens have no text
        answer.first = answer.ended
    elif answer.first is None:
        answer.error = "an empty answer"


def _has_text(chunk: dict[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or choice
        if any(delta.get(name) for name in ("content", "text", "reasoning", "reasoning_content", "tool_calls")):
            return True
    return False


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


PERCENTILES = (50, 90, 95, 99)
#: Key of a latency → its name.
MEASURES = {
    "ttft": "time to first token",
    "tpot": "time per token after the first",
    "itl": "time between parts of an answer",
    "e2el": "time of a whole answer",
}


def figures(answers: Sequence[TimedResponse], seconds: float, config: LoadConfig) -> dict[str, Any]:
    """Counts, rates a second, and means, medians, deviations and percentiles in milliseconds. seconds: of the whole
    measurement."""
    done = [answer for answer in answers if answer.error is None]
    values = {
        "ttft": [answer.time_to_first_token for answer in done],
        "tpot": [answer.time_per_token for answer in done if answer.tokens > 1],
        "itl": [gap for answer in done for gap in answer.gaps],
        "e2el": [answer.seconds for answer in done],
    }
    prompt, made = sum(answer.prompt_tokens for answer in done), sum(answer.tokens for answer in done)
    good = sum(_is_good(answer, config.goodput) for answer in done) if config.goodput else None
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": made,
        "request_throughput": len(done) / seconds,
        "request_goodput": None if good is None else good / seconds,
        "output_throughput": made / seconds,
        "total_token_throughput": (prompt + made) / seconds,
    }
    for name, each in values.items():
        milliseconds = [1000 * value for value in each]
        result |= {
            f"mean_{name}_ms": statistics.fmean(milliseconds) if milliseconds else None,
            f"median_{name}_ms": statistics.median(milliseconds) if milliseconds else None,
            f"std_{name}_ms": statistics.pstdev(milliseconds) if milliseconds else None,
            **{
                f"p{percentile}_{name}_ms": float(np.percentile(milliseconds, percentile)) if milliseconds else None
                for percentile in PERCENTILES
            },
        }
    return result


def _is_good(answer: TimedResponse, goals: dict[str, float]) -> bool:
    values = {"ttft": answer.time_to_first_token, "tpot": answer.time_per_token, "e2el": answer.seconds}
    return all(1000 * values[name] <= limit for name, limit in goals.items())


@dataclass(frozen=True)
class LoadResult:
    """The result of a load test. figures: of the function `figures`; errors: the count of each."""

    model: str
    figures: dict[str, Any]
    errors: Counter[str]
    answers: Sequence[TimedResponse]

    def as_json(self, url: str, config: LoadConfig, label: str | None = None) -> dict[str, Any]:
        """A result as `vllm bench serve` saves it."""
        done = [answer for answer in self.answers if answer.error is None]
        return {
            "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai" if config.api == "completions" else "openai-chat",
            "base_url": url,
            "label": label,
            "model_id": self.model,
            "num_prompts": config.requests,
            "request_rate": "inf" if config.rate is None else config.rate,
            "burstiness": config.burstiness,
            "max_concurrency": config.concurrency,
            **self.figures,
            "input_lens": [answer.prompt_tokens for answer in done],
            "output_lens": [answer.tokens for answer in done],
            "ttfts": [answer.time_to_first_token for answer in done],
            "itls": [answer.gaps for answer in done],
            "errors": dict(self.errors),
        }


def bench(url: str, config: LoadConfig, *, key: str | None = None, progress: Progress | None = None) -> LoadResult:
    """Load the server at `url` (with or without `/v1`) as the settings say.

    Raises BessemerError when the server cannot be reached, refuses the first request, or answers none. Ctrl-C ends the test
    early.
    """
    return asyncio.run(_bench(url.rstrip("/").removesuffix("/v1"), config, key, progress or Silent()))


async def _bench(url: str, config: LoadConfig, key: str | None, progress: Progress) -> LoadResult:
    # compression would delay parts
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=config.timeout, limits=limits) as client:
        model = config.model or await _first_model(client)
        # made before the first is sent, so that a mistake in the file is found first
        requests = iter([*itertools.islice(bodies(config, model), config.warmup + config.requests)])
        for number in range(config.warmup):
            answer = await ask(client, config.api, next(requests), config.timeout)
            if number == 0 and answer.error is not None:
                raise BessemerError(f"{url} refuses a request: {answer.error}")
        answers: list[TimedResponse] = []
        start = time.perf_counter()
        with progress.task("requests", total=config.requests, unit="requests") as bar:
            # after Ctrl-C, the answers until then are evaluated
            with contextlib.suppress(asyncio.CancelledError):
                await _load(client, config, requests, answers, bar)
        seconds = time.perf_counter() - start
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    if not answers or len(answers) == sum(errors.values()):
        reason = f": {errors.most_common(1)[0][0]}" if errors else ""
        raise BessemerError(f"{url} answered none of the requests{reason}")
    return LoadResult(model, figures(answers, seconds, config), errors, answers)


async def _load(
    client: httpx.AsyncClient, config: LoadConfig, requests: Iterator[dict[str, Any]], answers: list[TimedResponse], bar: Task
) -> None:
    """Send the requests as they arrive, at most `concurrency` at once."""
    places = asyncio.Semaphore(config.concurrency or config.requests)

    async def send(body: dict[str, Any]) -> None:
        try:
            answers.append(await ask(client, config.api, body, config.timeout))
        finally:
            places.release()
        bar.advance()

    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for body, wait in zip(requests, waits(config), strict=False):
            due += wait
            # a late arrival does not delay the next ones
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await places.acquire()
            group.create_task(send(body))


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise BessemerError(f"{client.base_url} answers {error.response.status_code} to /v1/models") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise BessemerError(f"{client.base_url} does not answer as an OpenAI-compatible server ({error})") from None
