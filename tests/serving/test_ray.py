"""Several replicas behind one entrance: the entrance with replicas in this process, and the whole of it on a local Ray."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from threading import Thread

import httpx
import openai
import pytest

from bessemer.assistant.conversation import Principal
from bessemer.serving.app import create_app
from bessemer.serving.config import ServingConfig
from bessemer.serving.ray.entrance import Entrance
from bessemer.serving.ray.forwarding import Forwarded, PrefixMemory, answer, prompt_of
from bessemer.serving.ray.replica import ModelStatistics
from bessemer.serving.responses.store import MemoryStore
from bessemer.serving.runtime.bodies import overloaded
from bessemer.serving.runtime.clients import SCOPE
from bessemer.serving.server import listen
from tests.serving.engine import FakeEngine
from tests.serving.running import babbling_engine
from tests.serving.test_gate import ASKED, babble, keys_file


class InProcess:
    """Replicas that are applications of this process, asked in turn."""

    def __init__(self, *engines, config=None):
        store = MemoryStore()
        self.engines = engines
        self.apps = [
            create_app(engine, "tiny", config or ServingConfig(), store=store, is_behind_gate=True) for engine in engines
        ]
        self.asked = []

    async def send(self, asked):
        if not self.apps:
            raise overloaded("there is none")
        self.asked.append(asked)
        async with aclosing(answer(self.apps[len(self.asked) % len(self.apps)], asked)) as parts:
            async for part in parts:
                yield part

    async def broadcast(self, asked):
        return [[part async for part in answer(app, asked)] for app in self.apps]

    async def count_ready(self):
        return len(self.apps)

    async def measure(self):
        return [[ModelStatistics("tiny", engine.statistics, ())] for engine in self.engines]


def entrance_of(replicas, public=(), **settings):
    return Entrance(replicas, "tiny", ServingConfig(**settings), public)


@pytest.fixture
def ask():
    """Asks an entrance, all of a test on one event loop: `ask(entrance, method, path, **request)`."""
    with asyncio.Runner() as runner:
        yield lambda *given, **request: runner.run(asked_once(*given, **request))


async def asked_once(entrance, method="POST", path="/v1/chat/completions", **request):
    transport = httpx.ASGITransport(entrance)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, **request)


def test_a_request_is_answered_by_a_replica_in_the_form_of_its_dialect(ask):
    replicas = InProcess(FakeEngine(), FakeEngine())
    entrance = entrance_of(replicas)
    assert ask(entrance, json=ASKED).json()["choices"][0]["message"]["content"] == "user: hi"
    said = ask(entrance, path="/v1/messages", json=ASKED | {"max_tokens": 50}).json()
    assert said["content"][0]["text"] == "user: hi"
    streamed = ask(entrance, json=ASKED | {"stream": True}).text
    assert streamed.endswith("data: [DONE]\n\n")
    wrong = ask(entrance, path="/v1/messages", json={"model": "none"})
    assert wrong.status_code == 400 and wrong.json()["type"] == "error"
    assert ask(entrance, "GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert len(replicas.asked) == 5 and entrance.requests == 0


def test_the_gate_is_the_entrances_and_keys_are_counted_there(ask, tmp_path):
    replicas = InProcess(FakeEngine(), FakeEngine())
    entrance = entrance_of(replicas, keys=keys_file(tmp_path / "keys.json", tokens_per_minute=15), public=["/page"])
    assert ask(entrance, json=ASKED).status_code == 401
    assert ask(entrance, json=ASKED, headers={"host": "evil.example"}).status_code == 403
    assert ask(entrance, "GET", "/page").status_code == 404
    ann = {"Authorization": "Bearer ann"}
    # the first takes more tokens than there are, which the entrance is told by the replica
    assert [ask(entrance, json=ASKED, headers=ann).status_code for _ in range(2)] == [200, 429]
    asked = replicas.asked[-1]
    assert asked.principal == Principal("ann", key="ann's") and asked.salt and not asked.is_admin
    # what it says begins with the salt: other clients' caches are of no use to it
    assert asked.prompt.startswith(asked.salt)
    assert all(engine.salts in ([], [asked.salt]) for engine in replicas.engines)


def test_adapters_are_loaded_on_all_replicas_and_the_worst_answer_is_told(ask, tmp_path):
    first, second = FakeEngine(), FakeEngine()
    loaded = []
    first.load_adapter = lambda name, folder: loaded.append(name)
    entrance = entrance_of(
        InProcess(first, second, config=ServingConfig(adapter_root=tmp_path)), keys=keys_file(tmp_path / "keys.json")
    )
    request = {"json": {"lora_name": "a", "lora_path": "a"}, "headers": {"X-Api-Key": "boss"}}
    assert ask(entrance, path="/v1/load_lora_adapter", **request).status_code == 500 and loaded == ["a"]
    second.load_adapter = first.load_adapter
    assert ask(entrance, path="/v1/load_lora_adapter", **request).status_code == 200
    assert loaded == ["a", "a", "a"]


def test_responses_are_found_whichever_replica_made_them(ask):
    entrance = entrance_of(InProcess(FakeEngine(), FakeEngine()))
    first = ask(entrance, path="/v1/responses", json={"model": "tiny", "input": "hi"}).json()
    then = ask(
        entrance, path="/v1/responses", json={"model": "tiny", "input": "and", "previous_response_id": first["id"]}
    ).json()
    assert then["status"] == "completed"
    streamed = ask(entrance, path="/v1/responses", json={"model": "tiny", "input": "hi", "stream": True}).text
    made = re.search(r"resp_\w+", streamed)[0]
    for identity in (first["id"], then["id"], made):
        for _ in range(2):
            assert ask(entrance, "GET", f"/v1/responses/{identity}").json()["id"] == identity
    assert ask(entrance, "DELETE", f"/v1/responses/{made}").status_code == 200
    assert [ask(entrance, "GET", f"/v1/responses/{made}").status_code for _ in range(2)] == [404, 404]


def test_a_draining_entrance_and_one_without_replicas_say_when_to_come_back(ask):
    entrance = entrance_of(InProcess())
    refused = ask(entrance, json=ASKED)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert ask(entrance, "GET", "/ready").status_code == 503
    entrance = entrance_of(InProcess(FakeEngine()))
    entrance.is_draining = True
    refused = ask(entrance, json=ASKED)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_overloaded"
    assert ask(entrance, "GET", "/ready").json()["status"] == "stopping"
    # who watches the server asks on
    assert ask(entrance, "GET", "/health").status_code == 200


def test_a_client_that_leaves_ends_its_request_on_the_replica():
    engine = FakeEngine(babble, context_length=10**6)
    entrance = entrance_of(InProcess(engine))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }

    async def run():
        came, gone = asyncio.Event(), asyncio.Event()
        body = json.dumps(ASKED | {"stream": True, "max_tokens": 500_000}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if b"delta" in message.get("body", b""):
                came.set()

        serving = asyncio.create_task(entrance(scope, receive, send))
        await asyncio.wait_for(came.wait(), 10)
        gone.set()
        await asyncio.wait_for(serving, 10)

    asyncio.run(run())
    assert engine.stopped.wait(10) and entrance.requests == 0


def test_a_prompt_is_paid_for_before_its_answer_is_there():
    async def slow(scope, receive, send):
        scope[SCOPE].spend(prompt=7)
        await asyncio.sleep(60)

    async def run():
        asked = Forwarded({"type": "http"}, b"", "req_1", Principal("ann"))
        async with aclosing(answer(slow, asked)) as parts:
            return await asyncio.wait_for(anext(parts), 10)

    part = asyncio.run(run())
    assert part.prompt_tokens == 7 and not part.messages


def test_errors_of_the_entrance_have_the_form_of_the_api(ask):
    entrance = entrance_of(InProcess(FakeEngine()))
    refused = ask(entrance, "DELETE", "/ready")
    assert refused.status_code == 405 and "error" in refused.json()


def test_what_an_application_fails_of_reaches_the_entrance():
    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("in the middle")

    async def run():
        asked = Forwarded({"type": "http"}, b"", "req_1", Principal("ann"))
        return [part async for part in answer(failing, asked)]

    with pytest.raises(ValueError, match="in the middle"):
        asyncio.run(run())


def test_prompts_that_begin_alike_are_texts_that_begin_alike():
    one = prompt_of(json.dumps({"max_tokens": 3, "messages": ["a", "b"], "model": "m"}).encode())
    other = prompt_of(json.dumps({"model": "m", "messages": ["a", "b", "c"], "stream": True}).encode())
    assert one.startswith('m\n["a", "b"') and other.startswith(one[:-1])
    assert prompt_of(b"{") == prompt_of(b"[1]") == prompt_of(b"[" * 100_000) == ""


def test_the_memory_of_prefixes():
    memory = PrefixMemory(block=4, most=8)
    memory.remember("aaaabbbbcccc", "one")
    memory.remember("aaaadddd", "two")
    assert memory.matches("aaaabbbbeeee", ["one", "two"]) == {"one": 2 / 3, "two": 1 / 3}
    assert memory.matches("aaaabbbbeeee", ["two"]) == {"two": 1 / 3}
    assert memory.matches("bbbb", ["one"]) == memory.matches("aaa", ["one"]) == {}
    memory.keep(["two"])
    assert memory.matches("aaaabbbb", ["one", "two"]) == {"two": 1 / 2}
    memory.remember("x" * 40, "one")
    # of ten blocks the first two, and all older ones, are forgotten
    assert memory.matches("aaaadddd", ["two"]) == {} and memory.matches("x" * 40, ["one"]) == {}


# --- on Ray -------------------------------------------------------------------------------------------------------


@contextmanager
def ray_server(folder, *options):
    """`bessemer serve --engine ray` in a process of its own: its URL, and the process."""
    pytest.importorskip("ray.serve")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "bessemer", "serve", str(folder), "--name", "tiny", "--engine", "ray", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--threads", "1", "--runs", str(folder.parent / "runs"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    lines = []

    def read():
        lines.extend(process.stdout)

    reading = Thread(target=read)
    reading.start()
    try:
        until = time.monotonic() + 180
        while not any("OpenAI API" in line for line in lines):
            assert process.poll() is None and time.monotonic() < until, "".join(lines)
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        reading.join(10)


def gauge(url, name):
    """A metric of each replica."""
    found = httpx.get(f"{url}/metrics", timeout=30).text
    return [float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)", found, re.MULTILINE)]


def refused_or_not(url):
    """Status and headers of an answer of 64 tokens."""
    asked = {"model": "tiny", "prompt": [7] * 9, "max_tokens": 64, "ignore_eos": True}
    answered = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    return answered.status_code, answered.headers


@pytest.mark.slow
def test_two_replicas_on_a_local_ray(tmp_path):
    with babbling_engine(tmp_path, context=512):
        pass
    limits = ("--kv-memory", "0.05", "--max-num-seqs", "8", "--max-waiting", "8", "--max-queued", "0")
    with ray_server(tmp_path / "model", "--replicas", "2", *limits) as (url, process):
        ready = httpx.get(f"{url}/ready", timeout=30).json()
        assert ready["replicas"] == 2
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=60, max_retries=0)
        body = {"model": "tiny", "prompt": [5] * 20, "extra_body": {"ignore_eos": True}}

        # the same prompt is answered alike by both
        texts = {client.completions.create(**body, max_tokens=8, temperature=0).choices[0].text for _ in range(6)}
        assert len(texts) == 1
        # a long beginning stays with one replica, which has it in its cache
        asked, hit = sum(gauge(url, "prefix_cache_queries_total")), sum(gauge(url, "prefix_cache_hits_total"))
        for number in range(6):
            client.completions.create(**body | {"prompt": "a b c d " * 40 + str(number)}, max_tokens=2)
        asked, hit = sum(gauge(url, "prefix_cache_queries_total")) - asked, sum(gauge(url, "prefix_cache_hits_total")) - hit
        assert hit > 0.7 * asked * 5 / 6

        # many at once
        errors = []

        def ask_one(number):
            try:
                client.completions.create(**body | {"prompt": [number % 50 + 1] * 9}, max_tokens=16)
            except openai.OpenAIError as error:
                errors.append(error)

        threads = [Thread(target=ask_one, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and all(made > 40 for made in gauge(url, "generation_tokens_total"))

        # a client that leaves
        with client.completions.create(**body, max_tokens=480, stream=True) as stream:
            next(iter(stream))
        until = time.monotonic() + 10
        while sum(gauge(url, "num_requests_running")) and time.monotonic() < until:
            time.sleep(0.05)
        assert sum(gauge(url, "num_requests_running")) == 0

        # more than may wait are refused, in the form of the API and with the time to come back
        with ThreadPoolExecutor(48) as pool:
            statuses = list(pool.map(lambda _: refused_or_not(url), range(48)))
        assert {status for status, _ in statuses} == {200, 503}
        assert all(headers["retry-after"] == "1" for status, headers in statuses if status == 503)
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200

        # a second server leaves the first alone
        second = subprocess.run(
            [sys.executable, "-m", "bessemer", "serve", str(tmp_path / "model"), "--engine", "ray", "--port", "0"],
            env={**os.environ, "RAY_ADDRESS": "auto"},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert second.returncode == 2 and "Ray Serve runs on this cluster already" in second.stderr

        # a replica that dies is replaced, and the other answers meanwhile
        replicas = subprocess.run(["pgrep", "-f", "ray::ServeReplica:bessemer:Engine"], capture_output=True, encoding="utf-8")
        subprocess.run(["kill", "-9", replicas.stdout.split()[0]], check=True)
        answered = 0
        until = time.monotonic() + 90
        while time.monotonic() < until:
            with suppress(openai.APIStatusError):
                client.completions.create(**body, max_tokens=2)
                answered += 1
            with suppress(httpx.HTTPError):
                if answered > 3 and httpx.get(f"{url}/ready", timeout=30).json()["replicas"] == 2:
                    break
            time.sleep(0.2)
        assert answered > 3 and httpx.get(f"{url}/ready", timeout=30).json()["replicas"] == 2

        # an answer under way is finished after SIGTERM
        with client.completions.create(**body, max_tokens=400, stream=True) as stream:
            pieces = iter(stream)
            next(pieces)
            process.send_signal(signal.SIGTERM)
            reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
        assert reasons[-1] == "length"
        assert process.wait(60) == 0


@pytest.mark.slow
def test_more_replicas_than_the_machine_has_room_for_are_refused_in_one_line(tmp_path):
    with babbling_engine(tmp_path):
        pass
    command = [sys.executable, "-m", "bessemer", "serve", str(tmp_path / "model"), "--engine", "ray", "--replicas", "999"]
    ended = subprocess.run([*command, "--port", "0"], capture_output=True, encoding="utf-8", timeout=180)
    assert ended.returncode == 2
    assert re.search(r"error: --replicas 999: each needs 1 of the cluster's \d+ CPUs", ended.stderr + ended.stdout)
