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
from bessemer.inference.request import Answer
from bessemer.model.kernels.build import library
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
        max_running=RUNNING,
        max_step_tokens=64,
        kernels="off" if library() is None else "on",
        threads=1,
    )
    return Engine(random_decoder(config), tokenizer, config=settings)


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    answer: Answer
    patience: int  # steps after which its client leaves


class Soak:
    """Random requests on one engine, a few more at once than it has places."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)
        # requests share beginnings, so that pages are shared
        self.parents = [self.random.choices(range(250), k=LONGEST) for _ in range(PARENTS)]
        self.under_way: list[Request] = []
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
        answer = self.engine.prepare(prompt, params, priority=choose.choice([0, 0, 0, 1, -1]))
        self.engine.begin(answer)
        self.under_way.append(Request(prompt, params, answer, choose.choice([0, 3, 30, 10**6, 10**6, 10**6])))

    def step(self) -> None:
        self.engine.step()
        staying = []
        for request in self.under_way:
            if all(each.done for each in (request.answer, *request.answer.siblings)):
                self.check(request)
                self.outcomes["served"] += 1
            elif request.patience == 0:
                self.engine.stop(request.answer)
                self.outcomes["left"] += 1
            else:
                request.patience -= 1
                staying.append(request)
        self.under_way = staying

    def check(self, request: Request) -> None:
        """What a finished request must be, whatever happened on the way."""
        params, completion = request.params, self.engine.completion(request.answer, request.params)
        assert 1 + len(completion.others) == params.n
        assert completion.prompt_tokens == len(request.prompt)
        for one in (completion, *completion.others):
            assert 1 <= one.completion_tokens <= params.max_tokens
            assert one.finish_reason == "stop" or one.completion_tokens == params.max_tokens
            if params.logprobs is not None:
                assert [sampled.token for sampled in one.log_probs] == one.token_ids
        if params.prompt_logprobs is not None:
            assert [sampled.token for sampled in completion.prompt_log_probs] == request.prompt[1:]


def resident_bytes() -> int:
    """Memory that this process has in use."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_nothing_is_held(engine: Engine) -> None:
    assert not engine.loop.busy and not engine.loop.scheduler.has_work
    for pool, _ in engine.loop.scheduler.groups:
        assert pool.free == pool.total
        assert not any(pool.references)


def test_no_page_is_lost_over_200_requests(tokenizer):
    soak = Soak(small_engine(tokenizer), seed=1)
    soak.run(200)
    assert_nothing_is_held(soak.engine)
    assert soak.outcomes.total() == 200 and soak.outcomes["left"] > 20
    scheduler = soak.engine.loop.scheduler
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
    assert soak.engine.loop.scheduler.preemptions > 200
    assert max(memory[5:]) - max(memory[1:5]) < 4 << 20, [f"{bytes / 2**20:.1f}" for bytes in memory]
