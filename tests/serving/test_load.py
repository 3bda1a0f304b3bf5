"""Many clients at once, some of whom leave: every answer whole or properly refused, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.cases import slow
from tests.serving.running import babbling_engine, servers


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return babbling_engine(tmp_path_factory.mktemp("load"), max_num_seqs=16, prefix_cache=False)


@pytest.fixture
def server(engine):
    made = []
    with servers() as start:
        url = start(engine, made=made, max_waiting=64, max_queued=4)
        yield url, made[0]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def counted(url: str) -> Counter:
    """The counters of `/metrics`, by name, and requests by how they ended."""
    found: Counter = Counter()
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if not line.startswith("#") and "_bucket" not in line:
            name, _, value = line.rpartition(" ")
            reason = name.partition('finished_reason="')[2].partition('"')[0]
            found[f"{name.partition('{')[0]}{':' + reason if reason else ''}"] += float(value)
    return found


async def ask(client: httpx.AsyncClient, generator: random.Random, leaves: bool) -> tuple[str, int]:
    """One streamed answer: `whole`, `left` or `refused`, and the tokens that came of it."""
    tokens, prompt = generator.randrange(4, 40), [generator.randrange(8, 60)] * generator.randrange(1, 60)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    came, ended, usage = 0, None, None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 503:
            assert answer.headers["retry-after"]
            await answer.aread()
            return "refused", 0
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            usage = event["usage"] or usage
            for choice in event["choices"]:
                came += len(choice["token_ids"] or ())
                ended = choice["finish_reason"] or ended
            if leaves and came >= tokens // 2:
                return "left", came
    assert ended == "length" and came == tokens == usage["completion_tokens"], (ended, came, tokens, usage)
    return "whole", came


async def crowd(url: str, clients: int, seconds: float) -> tuple[Counter, int]:
    """Clients that ask again and again, a third of whom leave midway: how often each thing came, and tokens of whole
    answers."""
    found, until = Counter(), time.monotonic() + seconds
    tokens = 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(number: int) -> None:
            nonlocal tokens
            generator, has_asked = random.Random(number), False
            # each at least once, however slow the machine is
            while not has_asked or time.monotonic() < until:
                has_asked = True
                how, came = await ask(client, generator, leaves=number % 3 == 0)
                found[how] += 1
                tokens += came if how == "whole" else 0
                if how == "refused":
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(one(number) for number in range(clients)))
    return found, tokens


def settled(engine, served, seconds: float = 10.0) -> None:
    """Wait until nothing is under way; fail where something stays."""
    until = time.monotonic() + seconds
    while served.requests or engine.statistics.running or engine.statistics.waiting:
        assert time.monotonic() < until, (served.requests, engine.statistics)
        time.sleep(0.02)
    assert sum(used for _, used in engine.statistics.blocks) == 0


@pytest.mark.parametrize(("clients", "seconds"), [(90, 1.0), slow(200, 120.0)])
def test_a_crowd_is_answered_or_refused_and_leaves_nothing(server, engine, clients, seconds):
    url, running = server
    served = running._served
    asyncio.run(crowd(url, 8, 0.2))  # what is made once is made
    settled(engine, served)
    before, threads, files, memory = counted(url), threading.active_count(), open_files(), resident()
    found, tokens = asyncio.run(crowd(url, clients, seconds))
    settled(engine, served)
    assert found["whole"] and found["left"] and found["refused"], found
    after = counted(url)
    new = Counter({name: after[name] - before[name] for name in after})
    assert new["vllm:request_success_total:length"] >= found["whole"]
    assert new["vllm:request_success_total:length"] + new["vllm:request_success_total:abort"] == found["whole"] + found["left"]
    assert new["vllm:generation_tokens_total"] >= tokens
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == after["vllm:kv_cache_usage_perc"] == 0
    gc.collect()
    # the pool beside the event loop is as large as Python makes it
    assert threading.active_count() <= threads + min(32, (os.cpu_count() or 1) + 4), " ".join(
        one.name for one in threading.enumerate()
    )
    assert open_files() <= files + 8
    if seconds > 60:
        assert resident() - memory < 64 * 2**20, (resident() - memory) / 2**20


@pytest.mark.parametrize("streams", [80, slow(1000)])
def test_streams_that_are_left_leave_no_page_task_or_socket(server, engine, streams):
    url, running = server
    served = running._served

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "tiny", "prompt": [9, 10 + number % 40], "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 200:
                async for _ in answer.aiter_raw():
                    return

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for start in range(0, streams, 40):
                await asyncio.gather(*(leave(client, number) for number in range(start, min(streams, start + 40))))

    asyncio.run(all_of_them())
    settled(engine, served)
    files, threads = open_files(), threading.active_count()
    asyncio.run(all_of_them())
    settled(engine, served)
    assert open_files() <= files + 4 and threading.active_count() <= threads + 1
