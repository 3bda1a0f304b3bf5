"""Streams of event loops: their texts, what they leave behind, and who hears of an error."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from tests.inference.models import small_decoder, small_tokenizer

PROMPTS = [[7], [9] * 20, [*range(40, 70)], "in the end a thin thing"]
SEEDED = SamplingParams(seed=3, max_tokens=16, ignore_eos=True)
#: Longer than a test reads.
ENDLESS = SEEDED.with_changes(max_tokens=150)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    tokenizer = small_tokenizer(tmp_path_factory.mktemp("streams"))
    return Engine(small_decoder("dense"), tokenizer, config=EngineConfig(block_size=8))


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    """After each test every block is free, and no thread is there that was not before."""
    before = set(threading.enumerate())
    yield
    join_driver()
    assert set(threading.enumerate()) <= before
    assert not engine.core.busy and all(used == 0 for _, used in engine.statistics.blocks)


def join_driver():
    for thread in threading.enumerate():
        if thread.name == "engine":
            thread.join(timeout=10)
            assert not thread.is_alive()


async def text_of(engine, prompt, params=SEEDED):
    return "".join([chunk.text async for chunk in engine.astream(prompt, params)])


async def texts_of(engine, prompts, params=SEEDED):
    return await asyncio.gather(*(text_of(engine, prompt, params) for prompt in prompts))


def test_streams_are_generates_completions(engine):
    expected = engine.generate(PROMPTS, SEEDED)

    async def all_at_once():
        streams = [engine.astream(prompt, SEEDED) for prompt in PROMPTS]
        return await asyncio.gather(*map(collected, streams))

    async def collected(stream):
        return [chunk async for chunk in stream]

    for chunks, completion in zip(asyncio.run(all_at_once()), expected, strict=True):
        assert "".join(chunk.text for chunk in chunks) == completion.text
        assert [token for chunk in chunks for token in chunk.token_ids] == completion.token_ids
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [completion.finish_reason]


def test_agenerate_gives_what_generate_gives(engine):
    params = [SEEDED, SEEDED.with_changes(n=3), SEEDED.with_changes(n=2, best_of=4), SamplingParams(temperature=0)]
    assert asyncio.run(engine.agenerate(PROMPTS, params)) == engine.generate(PROMPTS, params)


def test_a_streamed_conversation_is_chats(engine):
    messages = [{"role": "user", "content": "the thing?"}]

    async def streamed():
        return "".join([chunk.text async for chunk in engine.astream_chat(messages, SEEDED)])

    assert asyncio.run(streamed()) == engine.chat(messages, SEEDED).text


@pytest.mark.slow
def test_a_thousand_streams_of_which_a_third_is_cancelled_leave_nothing(engine):
    choose = random.Random(0)
    cases = [(prompt, SEEDED.with_changes(seed=seed)) for prompt in PROMPTS for seed in range(8)]
    expected = [one.text for one in engine.generate([prompt for prompt, _ in cases], [params for _, params in cases])]
    count, texts = 1000, [""] * 1000
    victims = sorted(((choose.randrange(10_000), task) for task in choose.sample(range(count), count // 3)), reverse=True)
    before = engine.statistics.finished
    tasks = []
    taken = 0

    async def read(index):
        nonlocal taken
        async for chunk in engine.astream(*cases[index % len(cases)]):
            texts[index] += chunk.text
            taken += 1
            while victims and victims[-1][0] <= taken:
                tasks[victims.pop()[1]].cancel()

    async def all_of_them():
        tasks.extend(asyncio.create_task(read(index)) for index in range(count))
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.to_thread(join_driver)
        return ends

    cancelled = [isinstance(end, asyncio.CancelledError) for end in asyncio.run(all_of_them())]
    assert 200 < sum(cancelled) <= count // 3
    for index, text in enumerate(texts):
        if cancelled[index]:
            assert expected[index % len(cases)].startswith(text)
        else:
            assert text == expected[index % len(cases)]
    ended = {reason: number - before[reason] for reason, number in engine.statistics.finished.items()}
    assert ended["abort"] > 100 and ended["length"] >= count - sum(cancelled) and not ended["error"]


@pytest.mark.parametrize("end", ["cancelled", "closed"])
def test_a_stream_that_ends_early_is_stopped_while_its_loop_runs_on(engine, end):
    async def part_of():
        async with aclosing(engine.astream("the", ENDLESS)) as stream:
            async for _ in stream:
                if end == "closed":
                    return
                asyncio.current_task().cancel()

    async def both():
        await asyncio.gather(asyncio.create_task(part_of()), return_exceptions=True)
        await asyncio.to_thread(join_driver)

    before = engine.statistics.finished
    asyncio.run(both())
    assert engine.statistics.finished == {**before, "abort": before["abort"] + 1}


def test_a_loop_that_is_closed_stops_its_requests(engine):
    aborted = engine.statistics.finished["abort"]
    loop = asyncio.new_event_loop()
    stream = engine.astream("the", ENDLESS)
    loop.run_until_complete(anext(stream))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    join_driver()
    assert engine.statistics.finished["abort"] == aborted + 1


def test_a_slow_reader_holds_up_no_other(engine):
    async def slow_and_quick():
        slow = engine.astream(PROMPTS[1], SEEDED)
        text = (await anext(slow)).text
        quick = await text_of(engine, PROMPTS[2], ENDLESS.with_changes(max_tokens=60))
        return text + "".join([chunk.text async for chunk in slow]), quick

    slow, quick = asyncio.run(slow_and_quick())
    assert slow == engine.generate([PROMPTS[1]], SEEDED)[0].text
    assert quick == engine.generate([PROMPTS[2]], ENDLESS.with_changes(max_tokens=60))[0].text


def test_two_event_loops_and_a_caller_without_one_share_the_steps(engine):
    expected = [one.text for one in engine.generate(PROMPTS, SEEDED)]
    with ThreadPoolExecutor(3) as pool:
        loops = [pool.submit(lambda: asyncio.run(texts_of(engine, PROMPTS * 5))) for _ in range(2)]
        plain = pool.submit(engine.generate, PROMPTS * 5, SEEDED)
        assert all(each.result() == expected * 5 for each in loops)
        assert [one.text for one in plain.result()] == expected * 5


def test_an_error_in_a_step_reaches_all_its_streams_and_the_next_are_served(engine, monkeypatch):
    forward = engine.core.runner.forward
    steps = iter(range(5))

    def failing(batch):
        next(steps, None) is None and (_ for _ in ()).throw(RuntimeError("the furnace is cold"))
        return forward(batch)

    async def all_fail():
        ends = await asyncio.gather(*(text_of(engine, prompt, ENDLESS) for prompt in PROMPTS), return_exceptions=True)
        assert [str(end) for end in ends] == ["the furnace is cold"] * len(PROMPTS)

    with monkeypatch.context() as patched:
        patched.setattr(engine.core.runner, "forward", failing)
        asyncio.run(all_fail())
    assert asyncio.run(text_of(engine, "the")) == engine.generate(["the"], SEEDED)[0].text


def test_an_error_of_one_stream_reaches_it_alone(engine):
    def fails(prompt, answer, logits):
        raise ValueError("no such word")

    async def both():
        params = [SEEDED, SEEDED.with_changes(logits_processor=fails)]
        return await asyncio.gather(*(text_of(engine, "the", one) for one in params), return_exceptions=True)

    text, error = asyncio.run(both())
    assert text == engine.generate(["the"], SEEDED)[0].text
    assert isinstance(error, RequestError) and "no such word" in str(error)


def test_what_cannot_be_served_is_refused(engine):
    with pytest.raises(RequestError, match="a stream is one answer"):
        engine.astream("the", SEEDED.with_changes(n=2))
    with pytest.raises(RequestError, match="the prompt has no tokens"):
        asyncio.run(text_of(engine, []))
    with pytest.raises(RequestError, match="beam search has no asynchronous form"):
        asyncio.run(engine.agenerate(["the"], SamplingParams(beam_width=2, temperature=0)))


def test_a_stream_that_nobody_reads_begins_nothing(engine):
    begun = engine.statistics.prompt_tokens
    stream = engine.astream("the", SEEDED)
    asyncio.run(stream.aclose())
    assert engine.statistics.prompt_tokens == begun


def test_an_engine_that_has_streamed_is_freed_without_the_collector(engine):
    other = Engine(engine.model, engine.tokenizer)
    asyncio.run(text_of(other, "the"))
    join_driver()
    freed = weakref.ref(other)
    gc.disable()
    try:
        del other
        assert freed() is None
    finally:
        gc.enable()
