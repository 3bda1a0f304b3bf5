"""Thousands of requests that come, grow, are cancelled and preempted: no page is lost, and memory stays flat."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.kv_cache import block_bytes, layer_groups
from bessemer.inference.request import Request
from bessemer.model.cpu_kernels import library
from tests.inference.models import BASE, small_tokenizer
from tests.model.randomised import random_decoder

BLOCK = 4
#: So few that the answers under way do not fit together.
PAGES = 60
RUNNING = 12
LONGEST = 80
PARENTS = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("soak"))


def small_engine(tokenizer) -> Engine:
    """Half of its layers see 10 tokens, so that there are two groups of pages."""
    config = BASE.with_changes(
        hidden_size=16,
        intermediate_size=16,
        head_dim=4,
        num_hidden_layers=2,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=10,
    )
    pages = sum(block_bytes(config, group, BLOCK, torch.float32) for group in layer_groups(config))
    settings = EngineConfig(
        block_size=BLOCK,
        kv_memory=(PAGES + 0.5) * pages / (1 << 30),
        max_num_seqs=RUNNING,
        max_num_batched_tokens=64,
        cpu_kernels="off" if library() is None else "on",
        threads=1,
    )
    return Engine(random_decoder(config), tokenizer, config=settings)


@dataclass
class Client:
    prompt: list[int]
    params: SamplingParams
    request: Request
    patience: int  # steps after which its client leaves


class Soak:
    """Random requests on one engine, a few more at once than it has places."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)
        # requests share beginnings, so that pages are shared
        self.parents = [self.random.choices(range(250), k=LONGEST) for _ in range(PARENTS)]
        self.under_way: list[Client] = []
        self.outcomes: Counter[str] = Counter()

    def run(self, requests: int) -> None:
        """Serve so many requests to their end."""
        for _ in range(requests):
            while len(self.under_way) > 2 * RUNNING:
                self.step()
            self.begin()
            if self.random.random() < 0.3:
                self.step()
        while self.under_way:
            self.step()

    def begin(self) -> None:
        choose = self.random
        length = choose.randint(1, LONGEST)
        prompt = choose.choice(self.parents)[:length]
        if choose.random() < 0.5:
            prompt[-1] = choose.randrange(250)
        params = SamplingParams(
            max_tokens=choose.randint(1, 60),
            temperature=choose.choice([0, 1]),
            seed=choose.randrange(1000),
            n=choose.choice([1, 1, 1, 3]),
            ignore_eos=choose.random() < 0.5,
            presence_penalty=choose.choice([0, 1]),
            stop=choose.choice([[], ["ab"]]),
            logprobs=choose.choice([None, 1]),
            prompt_logprobs=choose.choice([None, None, None, 0]),
        )
        request = self.engine.prepare(prompt, params, priority=choose.choice([0, 0, 0, 1, -1]))
        self.engine.begin(request)
        self.under_way.append(Client(prompt, params, request, choose.choice([0, 3, 30, 10**6, 10**6, 10**6])))

    def step(self) -> None:
        self.engine.step()
        staying = []
        for client in self.under_way:
            if all(each.done for each in (client.request, *client.request.siblings)):
                self.check(client)
                self.outcomes["served"] += 1
            elif client.patience == 0:
                self.engine.stop(client.request)
                self.outcomes["left"] += 1
            else:
                client.patience -= 1
                staying.append(client)
        self.under_way = staying

    def check(self, client: Client) -> None:
        """What a finished request must be, whatever happened on the way."""
        params, completion = client.params, self.engine.completion(client.request, client.params)
        assert 1 + len(completion.others) == params.n
        assert completion.prompt_tokens == len(client.prompt)
        for one in (completion, *completion.others):
            assert 1 <= one.completion_tokens <= params.max_tokens
            assert one.finish_reason == "stop" or one.completion_tokens == params.max_tokens
            if params.logprobs is not None:
                assert [sampled.token for sampled in one.log_probs] == one.token_ids
        if params.prompt_logprobs is not None:
            assert [sampled.token for sampled in completion.prompt_log_probs] == client.prompt[1:]


def resident_bytes() -> int:
    """Memory that this process has in use."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_nothing_is_held(engine: Engine) -> None:
    assert not engine.core.busy and not engine.core.scheduler.has_work
    for pool, _ in engine.core.scheduler.groups:
        assert pool.free == pool.total
        assert not any(pool.references)


def test_no_page_is_lost_over_200_requests(tokenizer):
    soak = Soak(small_engine(tokenizer), seed=1)
    soak.run(200)
    assert_nothing_is_held(soak.engine)
    assert soak.outcomes.total() == 200 and soak.outcomes["left"] > 20
    scheduler = soak.engine.core.scheduler
    assert scheduler.preemptions > 20 and scheduler.found_tokens > 0


@pytest.mark.slow
def test_no_page_is_lost_and_memory_is_flat_over_2000_requests(tokenizer):
    soak = Soak(small_engine(tokenizer), seed=2)
    memory = []
    for _ in range(10):
        soak.run(200)
        assert_nothing_is_held(soak.engine)
        memory.append(resident_bytes())
    assert soak.outcomes.total() == 2000 and soak.outcomes["left"] > 200
    assert soak.engine.core.scheduler.preemptions > 200
    assert max(memory[5:]) - max(memory[1:5]) < 4 << 20, [f"{bytes / 2**20:.1f}" for bytes in memory]
