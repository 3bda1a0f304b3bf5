"""What never reaches a route: foreign hosts and origins, strangers, bodies that are too large or never end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import threading
import time
from logging.handlers import QueueHandler
from queue import SimpleQueue

import httpx
import pytest
from starlette.datastructures import Headers

from bessemer.assistant.conversation import LOCAL
from bessemer.model.adapters.folder import ADAPTER_CONFIG, read_adapter, write_adapter
from bessemer.serving import server as connections
from bessemer.serving.app import create_app
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime import gate
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import SCOPE, Client, KeyRecord, Keys, hash_key, write_keys
from bessemer.serving.runtime.gate import PUBLIC, Gate
from bessemer.serving.runtime.served import CLAMPED, DROPPED, SUMMARISED
from bessemer.serving.server import open_many_files
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder
from tests.serving.engine import FakeEngine

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def babble(_: str):
    while True:
        yield "x"


def keys_file(path, **settings):
    """A file with the keys `ann`, which has the settings, and `boss`, an admin's."""
    ann = KeyRecord.parse({"name": "ann's", "user": "ann", "hash": hash_key("ann"), **settings})
    write_keys(path, [ann, KeyRecord(name="boss", hash=hash_key("boss"), admin=True)])
    return path


def status(url, path="/health", **headers):
    return httpx.get(url + path, headers={name.replace("_", "-"): value for name, value in headers.items()}).status_code


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:80", "10.0.0.7", "my.name:80"]
)
def test_addresses_of_numbers_and_names_that_are_let_in_are_answered(start, host):
    assert status(start(FakeEngine(), hosts=["my.name"]), host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "x/health?y=", "a@localhost", "::1", "localhost:x"],
)
def test_a_name_that_points_at_this_machine_is_turned_away(start, host):
    url = start(FakeEngine())
    for path in ("/health", "/v1/models", "/"):
        assert status(url, path, host=host) == 403


def test_a_host_that_looks_like_a_path_opens_no_route_that_needs_a_key(start):
    url = start(FakeEngine(), hosts=["*"], api_key="secret")
    for path in ("/v1/models", "/v1/responses/a", "/tokenize", "/nothing"):
        assert status(url, path, host="x/health?y=") == 401


def test_two_hosts_are_none(start):
    address = httpx.URL(start(FakeEngine()))
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_the_gate_itself_takes_several_hosts_for_none():
    async def answered(hosts):
        sent = []
        headers = [(b"host", host) for host in hosts]
        scope = {"type": "http", "method": "GET", "path": "/health", "headers": headers}

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        gate = Gate(app, ServingConfig(), None, lambda path, error: error.body())
        await gate(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(answered([b"localhost"])) == 200
    assert [asyncio.run(answered(hosts)) for hosts in ([b"localhost", b"evil"], [b""], [])] == [400] * 3


def test_a_message_that_promises_no_more_ends_the_body_and_its_time():
    async def read():
        waiting = [{"type": "http.request", "body": b"all"}]

        async def receive():
            if waiting:
                return waiting.pop()
            for _ in range(5):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        # no time is left for a second part
        reader = gate._BodyReader(receive, Client(LOCAL), most_bytes=10, seconds=0, bodies=gate._Bodies(10))
        return [await reader.receive() for _ in range(2)]

    body, end = asyncio.run(read())
    assert (body["body"], end["type"]) == (b"all", "http.disconnect")


async def sent_by(app, kind="http", host=b"localhost", path="/v1/models", keys=None, **more):
    """What the gate sends to a client, and the scopes that reach the app."""
    sent, reached = [], []

    async def inner(scope, receive, send):
        reached.append(scope)
        await app(send)

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    outer = Gate(inner, ServingConfig(request_log=True), keys, lambda path, error: error.body())
    await outer({"type": kind, "method": "GET", "path": path, "headers": [(b"host", host)], **more}, receive, send)
    return sent, reached


async def silent(send):
    pass


def test_a_socket_is_opened_as_a_page_is_asked_for():
    def opened(**more):
        return asyncio.run(sent_by(silent, "websocket", **more))

    sent, (scope,) = opened()
    assert sent == [] and scope[SCOPE].client.id == ""
    assert opened(host=b"evil.example") == ([{"type": "websocket.close", "code": 1008}], [])
    (begin, body), reached = opened(keys=Keys(single="secret"), extensions={"websocket.http.response": {}})
    assert (begin["type"], begin["status"], reached) == ("websocket.http.response.start", 401, [])
    assert body["type"] == "websocket.http.response.body" and b"invalid_api_key" in body["body"]


def test_what_is_no_request_passes_and_an_answer_that_has_begun_is_not_begun_again(monkeypatch, caplog):
    async def begun(send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ApiError("too late")

    async def refused(send):
        raise ApiError("no")

    sent, (scope,) = asyncio.run(sent_by(silent, "lifespan"))
    assert sent == [] and SCOPE not in scope
    assert [message.get("status") for message in asyncio.run(sent_by(begun))[0]] == [200]
    times = iter([7.0, 7.12345])
    monkeypatch.setattr(gate.time, "perf_counter", lambda: next(times))
    with caplog.at_level("INFO", logger=gate.REQUEST_LOG):
        assert [message.get("status") for message in asyncio.run(sent_by(refused))[0]] == [400, None]
    line = json.loads(caplog.records[-1].message)
    assert (line["seconds"], line["status"], line["key"]) == (0.123, 400, None)


def test_bodies_are_counted_to_the_byte(monkeypatch):
    monkeypatch.setattr(gate, "UNCOUNTED", 4)

    async def read(parts, left=10, most=20):
        waiting = [{"type": "http.request", "body": bytes(size), "more_body": True} for size in parts]
        bodies = gate._Bodies(left)

        async def receive():
            await asyncio.sleep(0)
            return waiting.pop(0)

        reader = gate._BodyReader(receive, Client(LOCAL), most, 10.0, bodies)
        seen = []
        for _ in parts:
            await reader.receive()
            seen.append(bodies.left)
        for _ in range(2):
            reader.close()
        assert bodies.left == left
        return seen

    assert asyncio.run(read([3, 1, 1, 4, 5])) == [10, 10, 9, 5, 0]
    assert asyncio.run(read([20], left=16)) == [0]
    for parts, left, status in (([20, 1], 100, 413), ([15], 10, 503)):
        with pytest.raises(ApiError) as refused:
            asyncio.run(read(parts, left))
        assert refused.value.status == status


@pytest.mark.parametrize(("announced", "is_refused"), [("10", False), ("11", True), ("", False), ("x", False)])
def test_a_body_is_refused_by_the_size_that_it_announces(announced, is_refused):
    async def check():
        reader = gate._BodyReader(None, Client(LOCAL), 10, 1.0, gate._Bodies(10))
        try:
            reader.check_announced(Headers({"content-length": announced}))
        except ApiError as error:
            return error.status == 413
        return False

    assert asyncio.run(check()) is is_refused


def test_a_revoked_key_ends_the_wait_for_a_client_that_stays():
    async def wait():
        calls = []

        async def receive():
            calls.append(1)
            if len(calls) == 1:
                return {"type": "http.request"}
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        client = Client(LOCAL)
        reader = gate._BodyReader(receive, client, 10, 1.0, gate._Bodies(10))
        await reader.receive()
        client.revoked.set()
        ends = [(await reader.receive())["type"] for _ in range(2)]
        waiting = reader._waiting
        reader.close()
        await asyncio.sleep(0)
        return ends, len(calls), waiting.cancelled()

    assert asyncio.run(wait()) == (["http.disconnect"] * 2, 2, True)


def test_only_pages_of_this_server_and_of_origins_that_are_let_in_may_use_it(start):
    url = start(FakeEngine(), origins=["https://my.page"])
    for method in ("GET", "POST", "HEAD", "DELETE", "OPTIONS"):
        assert httpx.request(method, url + "/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
        assert httpx.request(method, url + "/v1/models", headers={"Origin": "null"}).status_code == 403
    own = httpx.get(url + "/v1/models", headers={"Origin": url})
    foreign = httpx.get(url + "/v1/models", headers={"Origin": "https://my.page"})
    assert own.status_code == foreign.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    assert foreign.headers["access-control-allow-origin"] == "https://my.page"
    asks = {"Origin": "https://my.page", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(url + "/v1/chat/completions", headers=asks)
    assert preflight.status_code == 204 and "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    exposed = foreign.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", CLAMPED, DROPPED, SUMMARISED} <= set(exposed)
    # as the official clients ask, with headers that describe them
    mine = "Authorization,x-stainless-os, anthropic-dangerous-direct-browser-access,not a name,é"
    preflight = httpx.options(url + "/v1/messages", headers={**asks, "Access-Control-Request-Headers": mine.encode("latin-1")})
    allowed = preflight.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "x-stainless-os", "anthropic-dangerous-direct-browser-access"} <= set(allowed)
    assert not {"not a name", "é", "Authorization"} & set(allowed)


def test_every_route_needs_a_key_but_those_that_are_public(start):
    app = create_app(FakeEngine(), "tiny", ServingConfig(api_key="secret"))
    url = start(FakeEngine(), api_key="secret")
    described = app.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses/{identity}", "/v1/load_lora_adapter"} <= described.keys()
    for template, methods in described.items():
        path = re.sub(r"{\w+(:path)?}", "a", template)
        for method in methods:
            answered = httpx.request(method, url + path).status_code
            assert (answered == 401) == (template not in PUBLIC), (method, template)


def test_only_a_preflight_needs_no_key(start):
    url = start(FakeEngine(), api_key="secret", origins=["https://my.page"]) + "/v1/models"
    asks = {"Origin": "https://my.page", "Access-Control-Request-Method": "GET"}
    assert httpx.options(url, headers=asks).status_code == 204
    assert httpx.get(url, headers=asks).status_code == 401
    assert httpx.options(url, headers={"Origin": "https://my.page"}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer ann"},
        {"Authorization": "bearer  ann"},
        {"X-Api-Key": "ann"},
        {"Authorization": "Bearer guess", "X-Api-Key": "ann"},
    ],
)
def test_a_key_comes_in_either_header(start, tmp_path, headers):
    url = start(FakeEngine(), keys=keys_file(tmp_path / "keys.json"))
    assert status(url, "/v1/models", **headers) == 200
    assert status(url, "/v1/models", authorization="Bearer guess") == status(url, "/v1/models") == 401


def test_a_request_before_all_others_needs_an_admins_key_where_there_are_keys(start, tmp_path):
    engine = FakeEngine()
    url = start(engine, keys=keys_file(tmp_path / "keys.json"))
    asked = [("ann", 3), ("boss", -3), ("ann", -3)]
    answers = [
        httpx.post(url + "/v1/chat/completions", json=ASKED | {"priority": priority}, headers={"X-Api-Key": key})
        for key, priority in asked
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 403] and engine.priorities == [3, -3]
    assert answers[-1].json()["error"]["param"] == "priority"
    open_engine = FakeEngine()
    body = {"model": "tiny", "prompt": "a", "priority": -1}
    assert httpx.post(start(open_engine) + "/v1/completions", json=body).status_code == 200 and open_engine.priorities == [-1]


def test_a_client_has_its_requests_and_tokens_of_a_minute(start, tmp_path):
    url = start(FakeEngine(), keys=keys_file(tmp_path / "keys.json", requests_per_minute=2))
    ann = {"Authorization": "Bearer ann"}
    answers = [httpx.post(url + "/v1/chat/completions", json=ASKED, headers=ann) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    # an allowance is one client's
    assert httpx.post(url + "/v1/chat/completions", json=ASKED, headers={"X-Api-Key": "boss"}).status_code == 200

    url = start(FakeEngine(), keys=keys_file(tmp_path / "others.json", tokens_per_minute=15))
    answers = [httpx.post(url + "/v1/messages", json=ASKED | {"max_tokens": 100}, headers=ann) for _ in range(2)]
    # the first one takes more than there is, which is known at its end
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"


def test_clients_with_keys_share_no_prefix_cache(start, tmp_path):
    engine = FakeEngine()
    url = start(engine, keys=keys_file(tmp_path / "keys.json"))
    for key, salt in (("ann", None), ("ann", "s"), ("boss", None), ("boss", "s"), ("ann", "s")):
        asked = ASKED | ({} if salt is None else {"cache_salt": salt})
        httpx.post(url + "/v1/chat/completions", json=asked, headers={"X-Api-Key": key}).raise_for_status()
    assert None not in engine.salts and "s" not in engine.salts
    assert len(set(engine.salts)) == 4 and engine.salts[1] == engine.salts[4]


def test_a_revoked_key_ends_its_stream(start, tmp_path, monkeypatch):
    monkeypatch.setattr("bessemer.serving.app._REFRESH_SECONDS", 0.05)
    engine = FakeEngine(babble, context_length=10**9)
    path = keys_file(tmp_path / "keys.json")
    url = start(engine, keys=path)
    with httpx.stream(
        "POST", url + "/v1/chat/completions", json=ASKED | {"stream": True}, headers={"X-Api-Key": "ann"}
    ) as stream:
        news = stream.iter_lines()
        next(news)
        write_keys(path, [])
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in news:
                pass
    assert engine.stopped.wait(timeout=10)
    assert status(url, "/v1/models", x_api_key="ann") == 401


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_413_and_the_server_goes_on(start, announced):
    url = start(FakeEngine(), max_body=0.01)
    large = b"x" * 50_000_000
    content = large if announced else (large[place : place + 100_000] for place in range(0, len(large), 100_000))
    answer = httpx.post(url + "/v1/chat/completions", content=content, timeout=30)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    assert httpx.post(url + "/v1/messages", content=b" " * 20_000).json()["error"]["type"] == "request_too_large"
    assert status(url) == 200


def test_a_body_that_does_not_come_is_408(start):
    address = httpx.URL(start(FakeEngine(), body_seconds=0.2))
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


def test_a_connection_that_sends_no_whole_head_is_let_go(start, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    address = httpx.URL(start(FakeEngine()))
    silent, slow = (socket.create_connection((address.host, address.port), timeout=10) for _ in range(2))
    with silent, slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert silent.recv(1) == slow.recv(1) == b""
    # between two requests of one connection too
    with socket.create_connection((address.host, address.port), timeout=10) as kept:
        kept.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += kept.recv(1000)
        kept.sendall(b"GET /vers")
        assert b"".join(iter(lambda: kept.recv(1000), b"")) == b""


def test_a_thousand_connections_at_once_are_answered(start):
    # both ends of each are in this process
    open_many_files()
    address = httpx.URL(start(FakeEngine()))
    held = [socket.create_connection((address.host, address.port), timeout=30) for _ in range(1000)]
    try:
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in held)
    finally:
        for connection in held:
            connection.close()


def test_adapters_come_and_go_by_an_admins_key(start, tmp_path):
    class Adapting(FakeEngine):
        def load_adapter(self, name, folder):
            self.adapters += (name,)
            self.folder = folder

        def unload_adapter(self, name):
            self.adapters = tuple(adapter for adapter in self.adapters if adapter != name)

    root = tmp_path / "adapters"
    (root / "mine").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    engine = Adapting()
    url = start(engine, keys=keys_file(tmp_path / "keys.json"), adapter_root=root)

    def load(path, key="boss", name="mine"):
        body = {"lora_name": name, "lora_path": path}
        return httpx.post(url + "/v1/load_lora_adapter", json=body, headers={"X-Api-Key": key})

    assert load("mine", key="ann").status_code == 403
    for outside in ("..", ".", "/etc", "mine/../..", "link", "a\0b"):
        assert load(outside).status_code == 400, outside
    assert load("mine").status_code == 200 and engine.folder == root / "mine"
    assert load("mine").status_code == load("mine", name="tiny").status_code == 400
    listed = httpx.get(url + "/v1/models", headers={"X-Api-Key": "ann"}).json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "mine"]
    gone = httpx.post(url + "/v1/unload_lora_adapter", json={"lora_name": "mine"}, headers={"X-Api-Key": "boss"})
    assert gone.status_code == 200 and engine.adapters == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: "[" * 100_000, "damaged"),
        (lambda config: json.dumps(config | {"lora_alpha": 10**400}), "lora_alpha"),
        (lambda config: json.dumps(config | {"use_rslora": "false"}), "use_rslora"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_the_askers_error(start, tmp_path, change, reason):
    model, root = random_decoder(SHAPES["grouped"]), tmp_path / "adapters"
    write_adapter(random_adapter(model), model, root / "mine")
    config = root / "mine" / ADAPTER_CONFIG
    config.write_text(change(json.loads(config.read_text(encoding="utf-8"))), encoding="utf-8")

    class Adapting(FakeEngine):
        def load_adapter(self, name, folder):
            read_adapter(folder, model)

    url = start(Adapting(), keys=keys_file(tmp_path / "keys.json"), adapter_root=root)
    body = {"lora_name": "mine", "lora_path": "mine"}
    answer = httpx.post(url + "/v1/load_lora_adapter", json=body, headers={"X-Api-Key": "boss"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("lora_path: mine/adapter_config.json: ") and reason in message and "\n" not in message


def test_a_server_that_drains_finishes_what_runs_and_begins_nothing(start):
    release = threading.Event()

    def held(_):
        yield "first"
        release.wait(timeout=30)
        yield " last"

    servers = []
    url = start(FakeEngine(held), made=servers)
    with httpx.stream("POST", url + "/v1/chat/completions", json=ASKED | {"stream": True}) as stream:
        servers[0].drain()
        assert status(url, "/ready") == 503 and status(url, "/health") == 200
        refused = httpx.post(url + "/v1/chat/completions", json=ASKED)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        release.set()
        assert "".join(stream.iter_text()).rstrip().endswith("data: [DONE]")
    # it has stopped listening within some of its ticks
    with pytest.raises(httpx.TransportError):
        while True:
            httpx.get(url + "/health")


def test_the_first_sigterm_drains_and_the_second_ends_at_once(start):
    servers = []
    url = start(FakeEngine(babble, context_length=10**9), made=servers)
    with httpx.stream("POST", url + "/v1/chat/completions", json=ASKED | {"stream": True}) as stream:
        news = stream.iter_raw()
        next(news)
        servers[0].handle_exit(signal.SIGTERM, None)
        assert status(url, "/ready") == 503 and next(news) and not servers[0].should_exit
        servers[0].handle_exit(signal.SIGTERM, None)
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in news:
                pass


def test_a_drain_ends_when_its_time_has_come(start):
    release = threading.Event()

    def held(_):
        yield "first"
        release.wait(timeout=30)

    servers = []
    url = start(FakeEngine(held), made=servers, drain_seconds=0.0)
    with httpx.stream("POST", url + "/v1/chat/completions", json=ASKED | {"stream": True}) as stream:
        next(stream.iter_raw())
        servers[0].drain()
        with pytest.raises(httpx.TransportError):
            while True:
                httpx.get(url + "/health")
        release.set()


def test_the_log_of_requests_says_nothing_of_what_they_say(start, tmp_path, caplog):
    url = start(FakeEngine(), keys=keys_file(tmp_path / "keys.json"), request_log=True)
    lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = QueueHandler(lines)
    log = logging.getLogger("bessemer.requests")
    log.addHandler(handler)
    try:
        with caplog.at_level("INFO", logger="bessemer.requests"):
            asked = {"model": "tiny", "messages": [{"role": "user", "content": "a secret"}]}
            answer = httpx.post(url + "/v1/chat/completions", json=asked, headers={"X-Api-Key": "ann"})
            # a line is written behind the response
            first = json.loads(lines.get(timeout=10).message)
            httpx.get(url + "/v1/models?secret=1")
            second = json.loads(lines.get(timeout=10).message)
    finally:
        log.removeHandler(handler)
    usage = answer.json()["usage"]
    assert (first["key"], first["path"], first["model"], first["status"]) == ("ann's", "/v1/chat/completions", "tiny", 200)
    assert (first["prompt_tokens"], first["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert first["request"] == answer.headers["x-request-id"]
    assert (second["key"], second["status"]) == (None, 401)
    assert "secret" not in caplog.text


def test_answers_that_are_never_read_give_their_places_back(start, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    engine = FakeEngine(lambda _: iter(lambda: "x" * 100_000, ""), context_length=10**9, max_num_seqs=2)
    address = httpx.URL(start(engine, max_waiting=0))
    asked = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 10**8, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
    deaf = [socket.create_connection((address.host, address.port)) for _ in range(2)]
    try:
        for connection in deaf:
            connection.sendall(head + asked)
        assert engine.stopped.wait(timeout=20)
        until = time.monotonic() + 20
        while httpx.get(f"{address}/health").json()["requests"]:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        for connection in deaf:
            connection.close()


def test_an_answer_that_is_read_slowly_comes_whole(start, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(connections, "LEAST_READ", 1)
    parts = 200
    address = httpx.URL(start(FakeEngine(lambda _: iter(["x" * 100_000] * parts), context_length=10**9)))
    asked = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 10**8, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
    came, began = 0, time.monotonic()
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        connection.sendall(head + asked)
        while part := connection.recv(1 << 20):
            came += part.count(b"x")
            # three times as long as a reader may stand still
            time.sleep(max(0.0, 1.0 * came / (100_000 * parts) - (time.monotonic() - began)))
            if b"[DONE]" in part:
                break
    assert came >= 100_000 * parts


def test_large_bodies_that_are_held_keep_no_ordinary_request_away(start, monkeypatch):
    monkeypatch.setattr(gate, "BODIES", gate.BODIES._replace(most=1))
    url = start(FakeEngine(), body_seconds=20.0)
    address = httpx.URL(url)
    large = json.dumps(ASKED | {"user": "x" * 800_000})
    assert httpx.post(url + "/v1/chat/completions", content=large).status_code == 200
    part = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + b" " * 800_000
    until = time.monotonic() + 20
    answer = None
    while answer is None or answer.status_code != 503:
        assert time.monotonic() < until
        # the server refuses the body that it reads second: where that is the unfinished one, it is sent anew
        with socket.create_connection((address.host, address.port)) as held:
            held.sendall(part)
            answer = httpx.post(url + "/v1/chat/completions", content=large)
            ordinary = httpx.post(url + "/v1/chat/completions", json=ASKED | {"user": "x" * 50_000})
    assert answer.headers["retry-after"] and answer.json()["error"]["code"] == "server_overloaded"
    assert ordinary.status_code == 200
    until = time.monotonic() + 20
    # what is over is counted no longer
    while httpx.post(url + "/v1/chat/completions", content=large).status_code != 200:
        assert time.monotonic() < until
