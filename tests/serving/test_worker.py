"""The engine's thread: when it steps, whom it tells, and how it ends."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from bessemer.assistant.conversation import LOCAL
from bessemer.core.errors import LostProcessError, RequestError
from bessemer.inference.sampling.sampler import SamplingParams
from bessemer.serving.app import create_app
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.admission import Admission, QueueLimits, _Waiting
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller, Client
from bessemer.serving.runtime.worker import Worker
from bessemer.serving.server import address_of, create_server, listen
from tests.serving.engine import FakeEngine

PARAMS = SamplingParams(max_tokens=10)
BODY = {"model": "tiny", "prompt": "abc"}


def babble(_: str):
    while True:
        yield "x"


async def text_of(worker: Worker, engine: FakeEngine, prompt: str, params: SamplingParams = PARAMS) -> str:
    answer = engine.prepare(list(prompt.encode()), params)
    return "".join([piece.chunk.text async for pieces in worker.chunks([answer], Caller(Client(LOCAL))) for piece in pieces])


def test_no_step_is_taken_without_an_answer():
    engine = FakeEngine()
    worker = Worker(engine, max_waiting=0)

    prompts = ("abc", "defgh", "i", "jk")
    for prompt in prompts:
        assert asyncio.run(text_of(worker, engine, prompt)) == prompt
    worker.close()
    assert engine.steps == sum(len(prompt) + 1 for prompt in prompts)


def test_a_step_speaks_to_the_event_loop_once_for_all_streams(monkeypatch):
    engine = FakeEngine(max_num_seqs=64)
    worker = Worker(engine, max_waiting=0)
    calls = []

    async def many() -> list[str]:
        loop = asyncio.get_running_loop()
        tell = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *arguments: (calls.append(1), tell(*arguments))[1])
        return await asyncio.gather(*(text_of(worker, engine, "abcdefgh") for _ in range(64)))

    assert asyncio.run(many()) == ["abcdefgh"] * 64
    worker.close()
    assert len(calls) == engine.steps


def test_an_error_of_one_answer_reaches_it_alone():
    def reply(prompt: str):
        yield "a"
        if prompt == "bad":
            raise RequestError("the furnace is cold")
        yield "b"

    engine = FakeEngine(reply)
    worker = Worker(engine, max_waiting=0)

    async def both() -> list[str | BaseException]:
        return await asyncio.gather(*(text_of(worker, engine, prompt) for prompt in ("good", "bad")), return_exceptions=True)

    good, bad = asyncio.run(both())
    worker.close()
    assert good == "ab"
    assert isinstance(bad, RequestError) and str(bad) == "the furnace is cold"


@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_fails_is_500_and_the_next_request_is_served(start, monkeypatch, stream, caplog):
    engine = FakeEngine()
    url = start(engine) + "/v1/completions"
    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", lambda: 1 / 0)
        failed = httpx.post(url, json=BODY | {"stream": stream})
    assert "the server failed; its log says why" in failed.text and "division" not in failed.text
    assert failed.status_code == (200 if stream else 500)  # of a stream the status is long sent
    assert "ZeroDivisionError" in caplog.text
    assert httpx.post(url, json=BODY).json()["choices"][0]["text"] == "abc"


def fault(*_: object):
    raise RuntimeError("the furnace is cold")


def test_an_answer_that_cannot_be_stopped_leaves_the_thread_running(start, monkeypatch, caplog):
    engine = FakeEngine(lambda prompt: babble("") if prompt == "leaver" else iter(prompt), context_length=10**9)
    url = start(engine) + "/v1/completions"
    failed = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(engine, "stop", lambda answer: (failed.set(), fault()))
        asked = BODY | {"prompt": "leaver", "stream": True, "max_tokens": 10**8}
        with httpx.stream("POST", url, json=asked) as answer:
            next(answer.iter_lines())
        assert failed.wait(timeout=10)
    assert httpx.post(url, json=BODY).json()["choices"][0]["text"] == "abc"
    assert "the furnace is cold" in caplog.text


def test_all_are_told_of_a_failed_step_though_none_can_be_stopped(start, monkeypatch):
    engine = FakeEngine()
    url = start(engine) + "/v1/completions"
    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", fault)
        patched.setattr(engine, "stop", fault)
        assert httpx.post(url, json=BODY).status_code == 500
    assert httpx.post(url, json=BODY).json()["choices"][0]["text"] == "abc"


def test_an_error_while_one_answer_is_handed_over_reaches_it_alone(monkeypatch):
    engine = FakeEngine()
    completion = engine.completion
    monkeypatch.setattr(
        engine, "completion", lambda answer, params: fault() if params.max_tokens == 1 else completion(answer, params)
    )
    worker, prompt = Worker(engine, max_waiting=0), list(b"abc")

    async def both() -> list[object]:
        each = [SamplingParams(max_tokens=limit) for limit in (1, 1, 9)]
        asked = [worker.complete([engine.prepare(prompt, params)], params, Caller(Client(LOCAL))) for params in each]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=10)

    first, second, (third,) = asyncio.run(both())
    worker.close()
    assert isinstance(first, RuntimeError) and isinstance(second, RuntimeError)
    assert third.text == "abc"


def test_when_the_thread_ends_all_requests_fail_and_health_says_so(start, monkeypatch, caplog):
    engine = FakeEngine()
    url = start(engine)
    assert httpx.get(url + "/health").json()["status"] == "ok"
    monkeypatch.setattr(engine, "step", lambda: (_ for _ in ()).throw(SystemExit("killed")))
    for _ in range(2):
        failed = httpx.post(url + "/v1/completions", json=BODY)
        assert failed.status_code == 503 and "the engine has ended" in failed.json()["error"]["message"]
    health = httpx.get(url + "/health")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert "SystemExit" in caplog.text


def test_health_is_503_when_the_engine_can_answer_no_more():
    engine = FakeEngine()
    # the application alone: the server that runs it would stop by itself
    transport = httpx.ASGITransport(create_app(engine, "tiny"))

    async def health() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health")

    assert asyncio.run(health()).json()["status"] == "ok"
    engine.failure = LostProcessError("process 1 has ended")
    failed = asyncio.run(health())
    assert failed.status_code == 503 and failed.json()["reason"] == "process 1 has ended"


def test_a_request_that_comes_after_the_end_is_refused():
    engine = FakeEngine()
    worker = Worker(engine, max_waiting=0)
    assert asyncio.run(text_of(worker, engine, "abc")) == "abc"
    worker.close()
    with pytest.raises(ApiError, match="the server is stopping"):
        asyncio.run(asyncio.wait_for(text_of(worker, engine, "abc"), timeout=10))


def test_an_answer_of_several_choices_takes_as_many_places():
    worker = Worker(FakeEngine(max_num_seqs=2), max_waiting=2)
    with worker.admit(3):
        with worker.admit(1):
            with pytest.raises(ApiError) as caught, worker.admit(1):
                pass
            assert caught.value.status == 503
        assert (worker.requests, worker.completions) == (1, 3)
    assert (worker.requests, worker.completions) == (0, 0)


def test_a_server_that_stops_ends_its_answers_and_its_thread():
    engine = FakeEngine(babble, context_length=10**9)
    before = set(threading.enumerate())
    with listen("127.0.0.1", 0) as listener:
        server = create_server(engine, "tiny", ServingConfig())
        server.config.timeout_graceful_shutdown = 0  # its grace for answers under way is not what is tested
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with httpx.stream(
            "POST", address_of(listener) + "/v1/completions", json=BODY | {"stream": True, "max_tokens": 10**8}
        ) as answer:
            next(answer.iter_lines())
            server.should_exit = True
            thread.join(timeout=20)
    assert not thread.is_alive() and engine.stopped.is_set()
    assert not any(each.name == "engine" for each in set(threading.enumerate()) - before)


def test_completions_are_added_before_they_are_compared_with_the_places():
    worker = Worker(FakeEngine(max_num_seqs=64), max_waiting=32)
    with worker.admit(80):
        with pytest.raises(ApiError) as full, worker.admit(17):
            pass
        with worker.admit(16):
            assert worker.completions == 96
    assert full.value.status == 503 and worker.completions == 0


def test_a_request_for_more_completions_than_are_ever_admitted_is_wrong_and_not_early():
    worker = Worker(FakeEngine(max_num_seqs=64), max_waiting=32)
    # a quarter of the places of those that wait stays for others
    with pytest.raises(ApiError, match="at most 88 of one request") as refused, worker.admit(2048):
        pass
    assert refused.value.status == 400 and worker.completions == 0
    with worker.admit(88), worker.admit(8):
        pass


def test_requests_that_find_no_place_get_one_in_the_order_of_arrival_and_none_overtakes_the_first():
    worker, order = Worker(FakeEngine(max_num_seqs=2), max_waiting=0, queue=QueueLimits(3, 10)), []

    async def ask(name, completions, seconds=0.0):
        with await worker.place(completions, Caller(Client(LOCAL))):
            order.append(name)
            await asyncio.sleep(seconds)

    async def asked():
        asking = [asyncio.create_task(ask("first", 1, 0.05))]
        await asyncio.sleep(0)
        # one place is left, which the second does not fit in and the third may not take before it
        for name, completions in (("second", 2), ("third", 1), ("fourth", 1)):
            asking.append(asyncio.create_task(ask(name, completions)))
            await asyncio.sleep(0)
        with pytest.raises(ApiError, match="busy with 4 requests") as full:
            await ask("fifth", 1)
        assert full.value.status == 503 and full.value.headers["Retry-After"]
        await asyncio.gather(*asking)

    asyncio.run(asked())
    assert order == ["first", "second", "third", "fourth"] and (worker.requests, worker.completions) == (0, 0)


def test_a_wait_ends_with_its_time_with_its_client_and_with_the_server():
    worker = Worker(FakeEngine(max_num_seqs=1), max_waiting=0, queue=QueueLimits(3, 0.05))

    async def leave():
        return {"type": "http.disconnect"}

    async def refusal(caller):
        with pytest.raises(ApiError) as refused:
            with await worker.place(1, caller):
                pass
        return refused.value

    async def asked():
        gone, stays = Caller(Client(LOCAL), receive=leave), Caller(Client(LOCAL))
        with worker.admit(1):
            assert (await refusal(gone)).status == 499
            late = await refusal(stays)
            assert "no place was free within 0.05 s" in str(late) and late.headers["Retry-After"] == "10"
            stopped = asyncio.create_task(refusal(stays))
            await asyncio.sleep(0)
            worker.is_draining = True
            assert "the server is stopping" in str(await stopped)
            assert (worker.requests, worker.completions) == (1, 1)

    asyncio.run(asked())
    assert (worker.requests, worker.completions) == (0, 0)


def test_places_are_given_up_to_the_last_and_nothing_waits_without_a_queue():
    admission = Admission(places=3, most_at_once=2)
    assert (admission.requests, admission.completions, admission.failure, admission.is_draining) == (0, 0, None, False)
    assert QueueLimits() == (0, 0.0)

    async def asked():
        with await admission.place(2, Caller(Client(LOCAL))), await admission.place(1, Caller(Client(LOCAL))):
            assert (admission.requests, admission.completions) == (2, 3)
            with pytest.raises(ApiError, match="busy with 2 requests") as refused:
                with await admission.place(1, Caller(Client(LOCAL))):
                    pass
            assert refused.value.headers["Retry-After"] == "1"
            with pytest.raises(ApiError, match="asks for 3 completions, and this server computes at most 2"):
                await admission.place(3, Caller(Client(LOCAL)))

    asyncio.run(asked())
    assert (admission.requests, admission.completions) == (0, 0)
    admission.is_draining = False
    assert admission.is_draining is False


def test_a_wait_that_was_given_up_takes_no_place_and_keeps_nobody_from_one():
    admission = Admission(places=2, most_at_once=2, queue=QueueLimits(2, 10))

    async def asked():
        first = admission.admit(2)
        first.__enter__()
        waits = [asyncio.create_task(admission.place(number, Caller(Client(LOCAL)))) for number in (2, 1)]
        await asyncio.sleep(0)
        assert admission.requests == 3
        with pytest.raises(ApiError, match="busy with 3 requests"):
            with await admission.place(1, Caller(Client(LOCAL))):
                pass
        waits[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits[0]
        # one place is free, and it is the second's whose turn has come
        assert (admission.requests, admission.completions, len(admission._queue)) == (2, 2, 1)
        first.__exit__(None, None, None)
        with await waits[1]:
            assert (admission.requests, admission.completions) == (1, 1)
            # handed on, and given up before it was told
            waiting = _Waiting(1, asyncio.get_running_loop().create_future())
            admission._queue.append(waiting)
            admission.requests += 1
            admission._hand_on()
            assert admission.completions == 2 and waiting.turn.result() and not admission._queue
            admission._leave(waiting)
            assert (admission.requests, admission.completions) == (1, 1)
            # the server stops before its turn
            refused = _Waiting(1, asyncio.get_running_loop().create_future())
            gone = _Waiting(1, asyncio.get_running_loop().create_future())
            gone.turn.cancel()
            admission._queue += [refused, gone]
            admission.requests += 2
            admission.is_draining = True
            assert refused.turn.result() is False and not admission._queue
            for each in (refused, gone):
                admission._leave(each)
            assert (admission.requests, admission.completions) == (1, 1)

    asyncio.run(asked())
    assert (admission.requests, admission.completions) == (0, 0)


def test_what_waits_in_the_queue_stays_there_where_the_server_does_not_stop():
    admission = Admission(places=1, most_at_once=1, queue=QueueLimits(1, 10))

    async def asked():
        with admission.admit(1):
            waiting = asyncio.create_task(admission.place(1, Caller(Client(LOCAL))))
            await asyncio.sleep(0)
            admission.is_draining = False
            assert len(admission._queue) == 1
        with await waiting:
            pass

    asyncio.run(asked())
    assert (admission.requests, admission.completions) == (0, 0)


def test_places_handed_on_to_one_that_the_stopping_server_refuses_are_given_back():
    worker = Worker(FakeEngine(max_num_seqs=2), max_waiting=0, queue=QueueLimits(3, 10))

    async def asked():
        with worker.admit(2):
            waiting = asyncio.create_task(worker.place(2, Caller(Client(LOCAL))))
            await asyncio.sleep(0)
        assert (worker.requests, worker.completions) == (1, 2)
        worker.is_draining = True
        with pytest.raises(ApiError, match="the server is stopping"):
            await waiting

    asyncio.run(asked())
    assert (worker.requests, worker.completions) == (0, 0)


def test_what_waits_for_a_slow_reader_comes_in_parts_between_which_others_have_their_turn():
    engine = FakeEngine(lambda _: iter("x" * 500), context_length=1000)
    worker = Worker(engine, max_waiting=0)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def read() -> list[int]:
        answer = engine.prepare([1], SamplingParams(max_tokens=1000))
        news = worker.chunks([answer], Caller(Client(LOCAL)))
        parts = [len(await anext(news))]
        while not answer.done:
            await asyncio.sleep(0.001)
        beside = asyncio.create_task(others())
        parts += [len(chunks) async for chunks in news]
        beside.cancel()
        return parts

    parts = asyncio.run(asyncio.wait_for(read(), timeout=20))
    worker.close()
    assert sum(parts) == 501 and max(parts) <= 16
    assert turns >= len(parts) - 1
