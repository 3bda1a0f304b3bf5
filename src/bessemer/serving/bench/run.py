"""A load test from beginning to end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from bessemer.core.errors import BessemerError
from bessemer.core.progress import Progress, Silent, Task
from bessemer.serving.bench.client import Answer, ask
from bessemer.serving.bench.config import LoadConfig
from bessemer.serving.bench.figures import figures
from bessemer.serving.bench.workload import bodies, waits


@dataclass(frozen=True)
class Measured:
    """What a load test found. figures: as `figures.figures` gives them; errors: how often each came."""

    model: str
    figures: dict[str, Any]
    errors: Counter[str]
    answers: Sequence[Answer]

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


def bench(url: str, config: LoadConfig, *, key: str | None = None, progress: Progress | None = None) -> Measured:
    """Load the server at `url` (with or without `/v1`) as the settings say.

    Raises BessemerError when the server is not there, refuses the first request, or answers none. Interrupted, it measures what
    was answered until then.
    """
    return asyncio.run(_bench(url.rstrip("/").removesuffix("/v1"), config, key, progress or Silent()))


async def _bench(url: str, config: LoadConfig, key: str | None, progress: Progress) -> Measured:
    # parts are timed as they come, so none may wait for a compressor
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=config.timeout, limits=limits) as client:
        model = config.model or await _first_model(client)
        # all of them before the first is sent: a mistake in a file is found now
        asked = iter([*itertools.islice(bodies(config, model), config.warmup + config.requests)])
        for number in range(config.warmup):
            answer = await ask(client, config.api, next(asked), config.timeout)
            if number == 0 and answer.error is not None:
                raise BessemerError(f"{url} refuses a request: {answer.error}")
        answers: list[Answer] = []
        start = time.perf_counter()
        with progress.task("requests", total=config.requests, unit="requests") as bar:
            # Ctrl-C: what was answered is measured
            with contextlib.suppress(asyncio.CancelledError):
                await _load(client, config, asked, answers, bar)
        seconds = time.perf_counter() - start
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    if not answers or len(answers) == sum(errors.values()):
        reason = f": {errors.most_common(1)[0][0]}" if errors else ""
        raise BessemerError(f"{url} answered none of the requests{reason}")
    return Measured(model, figures(answers, seconds, config), errors, answers)


async def _load(
    client: httpx.AsyncClient, config: LoadConfig, asked: Iterator[dict[str, Any]], answers: list[Answer], bar: Task
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
        for body, wait in zip(asked, waits(config), strict=False):
            due += wait
            # an arrival that is late does not delay the next ones
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
