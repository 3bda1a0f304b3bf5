"""The server as its clients see it, through OpenAI's own client where that is the point."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import anthropic
import httpx
import openai
import pytest

from bessemer.assistant.messages import TextDelta
from bessemer.core.errors import RequestError
from bessemer.serving.openai.protocol import ChatRequest
from bessemer.serving.openai.replies import ChatReply
from bessemer.serving.runtime import streams
from bessemer.serving.runtime.worker import ChoiceEvents
from tests.serving.engine import ByteTokenizer, FakeEngine, ScriptedEngine

HELLO = [{"role": "user", "content": "héllo"}]
ECHO = "user: héllo"
PROMPT_TOKENS = 1 + len(f"{ECHO}\n".encode())


def body(**changes) -> dict:
    return {"model": "tiny", "messages": HELLO, **changes}


def babble(_: str):
    while True:
        yield "x"


def test_openai_client_gets_a_whole_chat_answer(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == ECHO
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, len(ECHO))
    assert answer.usage.total_tokens == PROMPT_TOKENS + len(ECHO)


def test_openai_client_streams_a_chat_answer(client):
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ECHO
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ECHO)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_client_gets_a_plain_completion_whole_and_streamed(client):
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=2)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("ab", "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 2)
    streamed = list(client.completions.create(model="tiny", prompt=list(b"abc"), stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "abc"
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_openai_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert (model.max_model_len, model.root, model.parent) == (128, "tiny", None)
    assert (model.input_modalities, model.image_size) == (["text"], None)
    assert model.permission[0]["allow_sampling"] and not model.permission[0]["allow_fine_tuning"]


def test_stream_is_events_that_end_in_done(start):
    answer = httpx.post(start(FakeEngine()) + "/v1/chat/completions", json=body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_who_speaks_in_a_chat_is_told_with_a_choices_first_token():
    reply = ChatReply(ChatRequest.model_validate(body(n=2)), ByteTokenizer(), SimpleNamespace(summarised=None))
    # half a character shows no text yet, and is a token all the same
    steps = [reply.events([ChoiceEvents(*one, ())]) for one in ((1, []), (1, [TextDelta("é")]), (0, [TextDelta("a")]))]
    choices = [[json.loads(event.removeprefix("data: "))["choices"][0] for event in step.split("\n\n")[:-1]] for step in steps]
    deltas = [[(choice["index"], choice["delta"]) for choice in step] for step in choices]
    begin = {"role": "assistant", "content": ""}
    assert deltas == [[(1, begin)], [(1, {"content": "é"})], [(0, begin), (0, {"content": "a"})]]


def test_sampling_settings_reach_the_engine(start):
    engine = FakeEngine()
    settings = {"temperature": 0.3, "top_p": 0.9, "top_k": 5, "seed": 11, "stop": "END", "max_completion_tokens": 7}
    httpx.post(start(engine) + "/v1/chat/completions", json=body(**settings)).raise_for_status()
    params = engine.seen[0]
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.3, 0.9, 5, 11)
    assert (list(params.stop), params.max_tokens) == (["END"], 7)


def test_a_salt_of_the_prefix_cache_reaches_the_engine(start):
    engine = FakeEngine()
    url = start(engine) + "/v1/chat/completions"
    for given in ({"cache_salt": "mine"}, {"cache_salt": None}, {}):
        httpx.post(url, json=body(**given)).raise_for_status()
    assert engine.salts == ["mine", None, None]
    refused = httpx.post(url, json=body(cache_salt=""))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")


def test_without_a_limit_a_chat_answer_may_fill_the_context(start):
    engine = FakeEngine(babble)
    answer = httpx.post(start(engine) + "/v1/chat/completions", json=body()).json()
    assert answer["usage"]["total_tokens"] == engine.context_length
    assert answer["choices"][0]["finish_reason"] == "length"


def test_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize("limit", [None, 1])
def test_request_over_the_context_is_400_with_openais_code(client, limit):
    with pytest.raises(openai.BadRequestError, match="128 tokens") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 200}], max_tokens=limit)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is_and_a_header_tells_it(start):
    engine = FakeEngine(babble)
    engine.longest = 120  # what the memory holds
    url, left = start(engine), engine.longest - PROMPT_TOKENS
    for path, asked in (
        ("chat/completions", body(max_tokens=32_000)),
        ("chat/completions", body(max_completion_tokens=32_000, stream=True)),
        ("messages", body(max_tokens=32_000)),
        ("messages", body(max_tokens=32_000, stream=True)),
        ("responses", {"model": "tiny", "input": HELLO, "max_output_tokens": 32_000}),
        ("responses", {"model": "tiny", "input": HELLO, "max_output_tokens": 32_000, "stream": True}),
    ):
        answer = httpx.post(f"{url}/v1/{path}", json=asked)
        assert (answer.status_code, answer.headers["x-max-tokens"]) == (200, str(left)), answer.text
        assert engine.seen[-1].max_tokens == left
    exact = httpx.post(f"{url}/v1/chat/completions", json=body(max_tokens=left))
    assert exact.status_code == 200 and "x-max-tokens" not in exact.headers


def test_each_of_several_prompts_has_the_tokens_that_there_is_room_for_behind_it(start):
    engine = FakeEngine(babble)
    answer = httpx.post(start(engine) + "/v1/completions", json={"model": "tiny", "prompt": ["a", "abc"], "max_tokens": 500})
    assert (answer.status_code, answer.headers["x-max-tokens"]) == (200, "124")
    assert [params.max_tokens for params in engine.seen] == [126, 124]


class Reading(FakeEngine):
    """Reads a prompt for as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.may_answer = threading.Event()

    def step(self):
        assert self.may_answer.wait(20)
        super().step()


@pytest.mark.parametrize(
    ("path", "asked", "first", "still_there"),
    [
        ("chat/completions", body(), "", ": still there"),
        ("completions", {"model": "tiny", "prompt": "abc"}, "", ": still there"),
        ("messages", body(max_tokens=50), "event: message_start", "event: ping"),
        ("responses", {"model": "tiny", "input": "abc"}, "event: response.created", ": still there"),
    ],
)
def test_a_stream_begins_and_says_that_it_is_still_there_while_the_prompt_is_read(
    start, monkeypatch, path, asked, first, still_there
):
    monkeypatch.setattr(streams, "QUIET_SECONDS", 0.01)
    engine = Reading()
    with httpx.stream("POST", f"{start(engine)}/v1/{path}", json={**asked, "stream": True}, timeout=10) as answer:
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
        lines = answer.iter_lines()
        begun = [next(lines)]
        while begun.count(still_there) < 2:
            begun.append(next(lines))
        assert begun[0] == (first or still_there)
        engine.may_answer.set()
        rest = list(lines)
    told = [json.loads(line.removeprefix("data: ")) for line in rest if line.startswith("data: {")]
    assert told and not any("error" in str(one.get("type")) or "error" in one for one in told)


def test_in_a_long_silence_there_are_events_that_the_official_clients_do_not_drop(connected, monkeypatch):
    monkeypatch.setattr(streams, "QUIET_SECONDS", 0.001)
    engine, seen, numbers = Reading(), 0, []
    with connected(openai.OpenAI, engine, "/v1").responses.stream(model="tiny", input="abc") as stream:
        for event in stream:
            numbers.append(event.sequence_number)
            seen += event.type == "response.in_progress"
            if seen == 3:
                engine.may_answer.set()
        assert stream.get_final_response().status == "completed" and numbers == sorted(set(numbers))
    engine, seen = Reading(), 0
    asked = {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "abc"}]}
    with connected(anthropic.Anthropic, engine).messages.stream(**asked) as stream:
        for event in stream:
            seen += event.type == "message_delta" and event.delta.stop_reason is None
            if seen == 2:
                engine.may_answer.set()
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and [block.type for block in final.content] == ["text"]


@pytest.mark.parametrize("more", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_a_chat_that_ends_with_the_assistant_is_gone_on_with(start, tokenizer, more):
    engine = ScriptedEngine(tokenizer, " warm.", " cold.")
    begun = [*HELLO, {"role": "assistant", "content": "It is"}]
    answer = httpx.post(start(engine) + "/v1/chat/completions", json=body(messages=begun, n=2, **more)).json()
    assert [one["message"]["content"] for one in answer["choices"]] == [" warm.", " cold."]
    assert engine.prompts[0].endswith("user\nhéllo\nassistant\nIt is")


def test_a_chat_that_ends_with_the_assistant_is_answered_anew_where_that_is_asked_for(start, tokenizer):
    engine = ScriptedEngine(tokenizer, "Again.")
    said = [*HELLO, {"role": "assistant", "content": "It is"}]
    url = start(engine) + "/v1/chat/completions"
    answer = httpx.post(url, json=body(messages=said, continue_final_message=False)).json()
    assert answer["choices"][0]["message"]["content"] == "Again."
    assert engine.prompts[0].endswith("assistant\nIt is\nassistant\n")
    nothing = body(messages=said, continue_final_message=False, add_generation_prompt=False)
    assert httpx.post(url, json=nothing).json()["error"]["param"] == "add_generation_prompt"


def test_what_changes_nothing_here_is_accepted(start):
    engine = FakeEngine()
    url = start(engine) + "/v1/chat/completions"
    said = [{"role": "system", "content": "Be brief.", "name": "house"}, {"role": "user", "content": "héllo", "name": "Ann"}]
    for more in ({"store": True}, {"verbosity": "low"}, {"messages": said}):
        answer = httpx.post(url, json=body(**more))
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == ECHO, answer.text
    assert httpx.post(url, json=body(verbosity=3)).status_code == 400


def test_every_error_has_openais_form(start):
    url = start(FakeEngine())
    answers = [
        httpx.post(url + "/v1/chat/completions", content=b"{"),
        httpx.post(url + "/v1/chat/completions", json=[]),
        httpx.post(url + "/v1/chat/completions", json=body(tools=[{}])),
        httpx.get(url + "/v1/chat/completions"),
        httpx.get(url + "/v1/nothing"),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 405, 404]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_request_that_the_engine_refuses_is_400(start):
    engine = FakeEngine()
    engine.tokenizer.encode = lambda text, add_bos=True: (_ for _ in ()).throw(RequestError("half a character"))
    answer = httpx.post(start(engine) + "/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "half a character")


def test_error_in_the_middle_of_a_stream_reaches_the_client(start):
    def fail(_):
        yield "so far "
        raise RequestError("the furnace is cold")

    with openai.OpenAI(base_url=start(FakeEngine(fail)) + "/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIError, match="the furnace is cold"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_stops_its_generation(start, stream):
    begun = threading.Event()

    def endless(_):
        begun.set()
        yield from babble("")

    engine = FakeEngine(endless, context_length=10**9)
    content = json.dumps(body(stream=stream))
    address = httpx.URL(start(engine))
    with socket.create_connection((address.host, address.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall((head + content).encode())
        assert begun.wait(timeout=10)
        assert not engine.stopped.is_set()
    assert engine.stopped.wait(timeout=10)


def test_client_that_leaves_while_it_waits_frees_its_place(start):
    release = threading.Event()

    def held(_):
        yield "first"
        release.wait(timeout=30)

    url = start(FakeEngine(held, max_num_seqs=1), max_waiting=1, max_queued=0)
    with httpx.Client() as client:
        first = client.send(client.build_request("POST", url + "/v1/chat/completions", json=body(stream=True)), stream=True)
        second = client.send(client.build_request("POST", url + "/v1/chat/completions", json=body(stream=True)), stream=True)
        assert httpx.post(url + "/v1/chat/completions", json=body()).status_code == 503
        second.close()
        assert any(httpx.get(url + "/health").json()["requests"] == 1 for _ in range(1000))
        third = client.send(client.build_request("POST", url + "/v1/chat/completions", json=body(stream=True)), stream=True)
        assert third.status_code == 200
        release.set()
        first.close()
        third.close()


def test_full_line_is_503_with_retry_after_and_health_still_answers(start):
    release = threading.Event()

    def held(_):
        yield "first"
        release.wait(timeout=30)  # the engine's thread is stuck, the event loop must not be

    url = start(FakeEngine(held, max_num_seqs=1), max_waiting=0, max_queued=0)
    with httpx.stream("POST", url + "/v1/chat/completions", json=body(stream=True)) as first:
        refused = httpx.post(url + "/v1/chat/completions", json=body())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(url + "/health").json() == {"status": "ok", "model": "tiny", "requests": 1}
        release.set()
        first.read()
    assert httpx.post(url + "/v1/chat/completions", json=body()).status_code == 200


def test_four_clients_generate_at_once_and_get_their_own_answers(start):
    started = []

    def patient_echo(prompt: str):
        started.append(prompt)
        while len(started) < 4:  # ends only if the others get turns meanwhile
            yield ""
        yield from prompt.strip()

    url = start(FakeEngine(patient_echo, context_length=10**9))

    def ask(number: int) -> str:
        with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=20) as client:
            messages = [{"role": "user", "content": f"number {number}"}]
            stream = client.chat.completions.create(model="tiny", messages=messages, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(4) as clients:
        assert list(clients.map(ask, range(4))) == [f"user: number {number}" for number in range(4)]


def test_api_key_is_asked_for_when_set(start):
    url = start(FakeEngine(), api_key="secret") + "/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        assert client.models.list().data
    with openai.OpenAI(base_url=url, api_key="guess", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="tiny", messages=HELLO)


def test_ids_of_all_tokens_are_told_where_they_are_asked_for(client):
    asked = {"model": "tiny", "messages": HELLO, "extra_body": {"return_token_ids": True}}
    whole = client.chat.completions.create(**asked)
    stream = list(client.chat.completions.create(**asked, stream=True))
    ids = [id for chunk in stream for id in chunk.choices[0].token_ids]
    assert ids == whole.choices[0].token_ids and len(ids) == len(ECHO)
    assert whole.prompt_token_ids == stream[0].prompt_token_ids and len(whole.prompt_token_ids) == PROMPT_TOKENS
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in stream[1:])
    plain = {"model": "tiny", "prompt": ["abc", "de"], "extra_body": {"return_token_ids": True}}
    choices = client.completions.create(**plain).choices
    assert [choice.prompt_token_ids for choice in choices] == [[256, 97, 98, 99], [256, 100, 101]]
    told = {0: [], 1: []}
    for chunk in client.completions.create(**plain, stream=True):
        told[chunk.choices[0].index] += chunk.choices[0].token_ids
    assert list(told.values()) == [choice.token_ids for choice in choices]


def test_a_conversation_is_read_once_for_all_its_answers(start, monkeypatch):
    engine, read = FakeEngine(), []
    encode = engine.tokenizer.apply_chat_template
    monkeypatch.setattr(
        engine.tokenizer, "apply_chat_template", lambda *given, **named: read.append(1) or encode(*given, **named)
    )
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 3}
    answered = httpx.post(start(engine) + "/v1/chat/completions", json=asked).json()
    assert [choice["message"]["content"] for choice in answered["choices"]] == ["user: hi"] * 3
    assert len(read) == 1
