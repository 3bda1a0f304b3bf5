"""Models beside the first one: opened when they are asked for, closed when another needs the place."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from bessemer.assistant.conversation import Principal
from bessemer.core.errors import ArtefactError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.storage.folder import save_model
from bessemer.serving.runtime.admission import QueueLimits
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller, Client
from bessemer.serving.runtime.models import ModelPool
from bessemer.serving.runtime.served import Served
from bessemer.serving.runtime.worker import Worker
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.engine import FakeEngine
from tests.serving.running import servers

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


class Opened:
    """Opens engines, and remembers which were opened and closed."""

    def __init__(self):
        self.opened, self.closed = [], []
        self.may_open = threading.Event()
        self.may_open.set()

    def __call__(self, place):
        self.may_open.wait(10)
        if place.read_text(encoding="utf-8") == "damaged":
            raise ArtefactError(f"{place}: damaged")
        self.opened.append(place.stem)
        engine = FakeEngine()
        engine.close = lambda: self.closed.append(place.stem)
        return engine


@pytest.fixture
def opened():
    return Opened()


@pytest.fixture
def places(tmp_path):
    sizes = {"small": 1, "middle": 1, "large": 3}
    for name, size in sizes.items():
        (tmp_path / f"{name}.gguf").write_text("x" * size, encoding="utf-8")
    (tmp_path / "broken.gguf").write_text("damaged", encoding="utf-8")
    return {name: tmp_path / f"{name}.gguf" for name in (*sizes, "broken")}


def pool(places, opened, **settings):
    return ModelPool(places, opened, max_waiting=4, **settings)


def test_the_one_that_was_asked_for_the_longest_time_ago_goes_first(places, opened):
    async def asked():
        found = pool(places, opened, most=2)
        for name in ("small", "middle", "small", "large"):
            await found.model(name)
        return [one.name for one in found.open_models]

    assert asyncio.run(asked()) == ["small", "large"]
    assert opened.opened == ["small", "middle", "large"] and opened.closed == ["middle"]


def test_files_of_open_models_fit_the_memory(places, opened):
    async def asked():
        # bytes, in GiB
        found = pool(places, opened, most=9, memory=3 / 2**30)
        await found.model("small")
        await found.model("middle")
        await found.model("large")
        assert [one.name for one in found.open_models] == ["large"]
        with pytest.raises(ApiError, match="larger than the memory"):
            await pool(places, opened, memory=2 / 2**30).model("large")

    asyncio.run(asked())


def test_a_model_that_answers_is_not_closed_and_the_other_waits_its_turn(places, opened):
    async def asked():
        found = pool(places, opened, most=1)
        one = await found.model("small")
        with one.worker.admit(1):
            with pytest.raises(ApiError) as refused:
                await found.model("middle")
            assert refused.value.status == 503 and refused.value.headers["Retry-After"]
        await found.model("middle")

    asyncio.run(asked())
    assert opened.closed == ["small"]


def test_a_model_is_not_closed_between_its_opening_and_the_admission_of_its_request(places, opened):
    async def answered(served, name):
        caller = Caller(Client(Principal("anybody")))
        try:
            with (await served.model_for(name, caller)).worker.admit(1):
                return name not in opened.closed
        except ApiError as refused:
            assert "no place is free" in str(refused)
            return None
        finally:
            caller.held.close()

    async def asked():
        found = pool(places, opened, most=1)
        served = Served(FakeEngine(), "tiny", Worker(FakeEngine(), 4), pool=found)
        both = await asyncio.gather(answered(served, "small"), answered(served, "middle"))
        # with its request, the lease has ended
        return [*both, await answered(served, "middle")]

    assert asyncio.run(asked()) == [True, None, True]
    assert opened.closed == ["small"]


def test_a_request_waits_for_a_model_to_be_idle_and_later_ones_wait_behind_it(places, opened):
    async def asked():
        found = pool(places, opened, most=1, queue=QueueLimits(4, 10))
        order = []

        async def ask(name, seconds):
            with found.lease(name):
                model = await found.model(name)
                order.append(name)
                with model.worker.admit(1):
                    await asyncio.sleep(seconds)

        asking = [asyncio.create_task(ask("small", 0.05))]
        await asyncio.sleep(0.02)
        for name in ("middle", "small", "small"):
            asking.append(asyncio.create_task(ask(name, 0)))
            await asyncio.sleep(0)
        assert found.requests == 4
        await asyncio.gather(*asking)
        return order

    assert asyncio.run(asked()) == ["small", "middle", "small", "small"]
    assert opened.opened == ["small", "middle", "small"]


def test_a_request_that_has_no_turn_in_time_or_finds_the_queue_full_is_told_when_to_ask_again(places, opened):
    async def asked():
        found = pool(places, opened, most=1, queue=QueueLimits(1, 0.05))
        with found.lease("small"):
            await found.model("small")
            late, behind = (asyncio.create_task(found.model(name)) for name in ("middle", "large"))
            await asyncio.sleep(0)
            with pytest.raises(ApiError, match="2 requests wait for their model; try again later") as full:
                await found.model("middle")
            for waited in (late, behind):
                with pytest.raises(ApiError, match=r"had no turn within 0\.05 s, while other models") as refused:
                    await waited
                assert {one.value.status for one in (full, refused)} == {503}
                assert {one.value.headers["Retry-After"] for one in (full, refused)} == {"10"}
            # small answers all the while
            assert not (await found.model("small")).worker.is_draining
        return (await found.model("large")).name

    assert asyncio.run(asked()) == "large"
    assert opened.closed == ["small"]


def test_two_requests_open_a_model_once(places, opened):
    async def asked():
        found = pool(places, opened)
        opened.may_open.clear()
        both = [asyncio.create_task(found.model("small")) for _ in range(2)]
        await asyncio.sleep(0.05)
        opened.may_open.set()
        first, second = await asyncio.gather(*both)
        assert first is second

    asyncio.run(asked())
    assert opened.opened == ["small"]


def test_what_nobody_asks_for_is_closed_after_its_time(places, opened):
    now = [0.0]

    async def asked():
        found = pool(places, opened, keep_alive=60, clock=lambda: now[0])
        await found.model("small")
        now[0] = 30
        await found.model("middle")
        now[0] = 61
        await found.close_idle()
        assert [one.name for one in found.open_models] == ["middle"]
        found.drain()
        with pytest.raises(ApiError, match="stopping"):
            await found.model("small")

    asyncio.run(asked())


def test_a_damaged_model_is_named_without_its_place_and_the_others_go_on(places, opened):
    async def asked():
        found = pool(places, opened)
        with pytest.raises(ApiError) as refused:
            await found.model("broken")
        assert "broken.gguf: damaged" in str(refused.value) and str(places["broken"].parent) not in str(refused.value)
        await found.model("small")

    asyncio.run(asked())


@pytest.fixture
def url(places, opened):
    with servers() as start:
        yield start(FakeEngine(), pool=pool(places, opened), aliases=["gpt-4o-mini"])


def test_every_dialect_reaches_a_model_by_its_name(url, opened):
    names = [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]
    assert names == ["tiny", "gpt-4o-mini", "small", "middle", "large", "broken"]
    said = [{"role": "user", "content": "abc"}]
    for path, body in (
        ("/v1/chat/completions", {"model": "small", "messages": said}),
        ("/v1/completions", {"model": "middle", "prompt": "abc"}),
        ("/v1/messages", {"model": "small", "messages": said, "max_tokens": 5}),
        ("/v1/responses", {"model": "middle", "input": "abc"}),
        ("/tokenize", {"model": "small", "prompt": "abc"}),
        ("/v1/chat/completions", {"model": "gpt-4o-mini", "messages": said}),
    ):
        answer = httpx.post(f"{url}{path}", json=body, timeout=30)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.json().get("model", body["model"]) == body["model"]
    assert opened.opened == ["small", "middle"]
    assert httpx.get(f"{url}/v1/models/large").json()["max_model_len"] is None
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "none", "messages": said})
    assert answer.status_code == 404 and "'large'" in answer.json()["error"]["message"]
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "broken", "messages": said})
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_real_models_come_and_go_and_each_answers_as_it_does_alone(tmp_path):
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    places = {}
    for name, shape in (("one", "grouped"), ("two", "multi-head, untied"), ("three", "grouped")):
        config = SHAPES[shape].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=64)
        save_model(random_decoder(config), tmp_path / name, tokenizer=tokenizer)
        places[name] = tmp_path / name
    asked = {"prompt": "the end", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    alone = {name: Engine(place, device="cpu").generate(["the end"], GREEDY)[0].text for name, place in places.items()}
    found = ModelPool(
        {name: places[name] for name in ("two", "three")}, lambda place: Engine(place, device="cpu"), max_waiting=4, most=1
    )
    with servers() as start:
        url = start(Engine(places["one"], device="cpu"), pool=found)
        for name in ("two", "tiny", "three", "two"):
            answer = httpx.post(f"{url}/v1/completions", json={"model": name, **asked}, timeout=60).json()
            assert answer["choices"][0]["text"] == alone["one" if name == "tiny" else name]
        metrics = httpx.get(f"{url}/metrics").text
        assert 'vllm:generation_tokens_total{engine="0",model_name="two"} 8.0' in metrics and '"three"' not in metrics


def test_a_model_that_opens_while_the_server_stops_is_closed_and_nobody_is_admitted(places, opened):
    async def asked():
        found = pool(places, opened)
        opened.may_open.clear()
        one = asyncio.create_task(found.model("small"))
        await asyncio.sleep(0.05)
        assert found.requests == 1
        found.drain()
        opened.may_open.set()
        with pytest.raises(ApiError, match="stopping"):
            await one
        assert found.requests == 0 and found.open_models == []

    asyncio.run(asked())
    assert opened.opened == opened.closed == ["small"]


def test_nothing_is_closed_for_a_model_that_would_not_fit_all_the_same(places, opened):
    async def asked():
        found = pool(places, opened, most=9, memory=3 / 2**30)
        one, _ = await found.model("small"), await found.model("middle")
        # beside the one that answers there are two bytes, and it has three
        with one.worker.admit(1), pytest.raises(ApiError, match="no place is free"):
            await found.model("large")

    asyncio.run(asked())
    assert opened.closed == []


def test_a_file_that_is_gone_is_said_and_the_server_goes_on(places, opened):
    async def asked():
        places["small"].unlink()
        found = pool(places, opened)
        with pytest.raises(ApiError, match="cannot be opened") as refused:
            await found.model("small")
        assert refused.value.status == 503
        await found.model("middle")

    asyncio.run(asked())
