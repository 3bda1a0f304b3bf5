"""The cases of the Open Responses compliance suite (specification of 2026-04-24), each by its name there, against a server.

The suite itself is TypeScript for bun, which is not on a registry. What it checks with schemas is checked here by hand, and in
`peer` tests by the models that PyPI's `openresponses-types` has from the specification's OpenAPI document.
"""

from __future__ import annotations

import base64
import json
import socket
from contextlib import contextmanager

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.serving.responses.items import decode_compaction, encode_compaction
from bessemer.serving.runtime.clients import KeyRecord, hash_key, write_keys
from tests.model.picture_files import drawn, encoded, write_picture_model
from tests.serving.engine import ScriptedEngine

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a place",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "San Francisco, CA"}}\n</tool_call>'
PICTURE = f"data:image/png;base64,{base64.b64encode(encoded(drawn(32, 32))).decode()}"
NULL = type(None)
#: What a response has, always, with the types of each.
RESOURCE = {
    **dict.fromkeys(("id", "model", "service_tier"), (str,)),
    **dict.fromkeys(("created_at", "top_logprobs"), (int,)),
    **dict.fromkeys(("top_p", "temperature", "presence_penalty", "frequency_penalty"), (int, float)),
    **dict.fromkeys(("completed_at", "max_output_tokens", "max_tool_calls"), (int, NULL)),
    **dict.fromkeys(("previous_response_id", "instructions", "safety_identifier", "prompt_cache_key"), (str, NULL)),
    **dict.fromkeys(("incomplete_details", "error", "usage"), (dict, NULL)),
    **dict.fromkeys(("output", "tools"), (list,)),
    **dict.fromkeys(("store", "background", "parallel_tool_calls"), (bool,)),
    **dict.fromkeys(("text", "reasoning", "metadata"), (dict,)),
    "object": (str,),
    "status": (str,),
    "tool_choice": (str, dict),
    "truncation": (str,),
}
ITEMS = {
    "message": {"id", "status", "role", "content"},
    "function_call": {"id", "status", "call_id", "name", "arguments"},
    "reasoning": {"id", "summary"},
    "compaction": {"id", "encrypted_content"},
}
USAGE = {"input_tokens", "output_tokens", "total_tokens", "input_tokens_details", "output_tokens_details"}
#: Fields of an event beside its type and number.
EVENTS = {
    **{f"output_item.{moment}": {"output_index", "item"} for moment in ("added", "done")},
    **{f"content_part.{moment}": {"item_id", "output_index", "content_index", "part"} for moment in ("added", "done")},
    "output_text.delta": {"item_id", "output_index", "content_index", "delta"},
    "output_text.done": {"item_id", "output_index", "content_index", "text"},
    "function_call_arguments.delta": {"item_id", "output_index", "delta"},
    "function_call_arguments.done": {"item_id", "output_index", "arguments"},
    **{state: {"response"} for state in ("created", "in_progress", "completed", "incomplete", "failed")},
}
ENDS = ("response.completed", "response.incomplete", "response.failed", "error")


def check_response(response):
    """The schema `ResponseResource`."""
    wrong = {
        name: response.get(name, "missing") for name, kinds in RESOURCE.items() if type(response.get(name, ...)) not in kinds
    }
    assert not wrong
    assert response["object"] == "response" and {"effort", "summary"} == set(response["reasoning"])
    assert response["status"] == "in_progress" or set(response["usage"]) >= USAGE
    for item in response["output"]:
        assert set(item) >= ITEMS[item["type"]]
    for tool in response["tools"]:
        assert set(tool) >= {"type", "name", "description", "parameters", "strict"}
    assert response["text"]["format"]["type"] in ("text", "json_object", "json_schema")


def check_event(event):
    """The schema of an event of a stream."""
    kind = event["type"].removeprefix("response.")
    assert set(event) >= {"sequence_number", *EVENTS[kind]}, event
    if "response" in event:
        check_response(event["response"])
    if item := event.get("item"):
        assert set(item) >= ITEMS[item["type"]]


def check_compaction(body):
    """The schema `CompactResource`."""
    assert body["object"] == "response.compaction" and isinstance(body["created_at"], int) and set(body["usage"]) >= USAGE
    assert body["id"] and all(set(item) >= ITEMS[item["type"]] for item in body["output"])


@pytest.fixture(params=["by hand", pytest.param("by its models", marks=pytest.mark.peer(name="protocols"))])
def schemas(request):
    """Checks of a response, an event, and a compaction."""
    if request.param == "by hand":
        return check_response, check_event, check_compaction
    import openresponses_types as types
    from pydantic import TypeAdapter

    named = [kind for name, kind in vars(types).items() if name.endswith("StreamingEvent")]
    events = {value.value: kind for kind in named for value in kind.model_fields["type"].annotation}

    def event(body):
        TypeAdapter(events[body["type"]]).validate_python(body)

    return types.ResponseResource.model_validate, event, types.CompactResource.model_validate


def message(role, content, **more):
    return {"type": "message", "role": role, "content": content, **more}


#: The suite's requests: id, what the model writes, the request, the type of an item of the output.
CASES = {
    "basic-response": ("Hello to you", {"input": [message("user", "Say hello in 3 words.")]}, "message"),
    "assistant-phase": (
        "four",
        {
            "input": [
                message("assistant", "I should answer with the saved number.", phase="commentary"),
                message("assistant", "The number is four.", phase="final_answer"),
                message("user", "Repeat only the number."),
            ]
        },
        "message",
    ),
    "streaming-response": ("1 2 3 4 5", {"input": [message("user", "Count to 5.")], "stream": True}, "message"),
    "system-prompt": ("Arr", {"input": [message("system", "You are a pirate."), message("user", "Say hello.")]}, "message"),
    "tool-calling": (CALL, {"input": [message("user", "Is it warm?")], "tools": [TOOL]}, "function_call"),
    "tool-calling-streaming": (
        CALL,
        {"input": [message("user", "Is it warm?")], "tools": [TOOL], "stream": True},
        "function_call",
    ),
    "multi-turn": (
        "Alice",
        {"input": [message("user", "I am Alice."), message("assistant", "Hello Alice!"), message("user", "What is my name?")]},
        "message",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_response(case, start, tokenizer, schemas):
    answer, body, kind = CASES[case]
    check, check_stream, _ = schemas
    reply = httpx.post(start(ScriptedEngine(tokenizer, answer)) + "/v1/responses", json={"model": "tiny", **body})
    assert reply.status_code == 200
    if body.get("stream"):
        events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n") if line.startswith("data: ")]
        for event in events:
            check_stream(event)
        names = [event["type"] for event in events]
        assert kind != "function_call" or {"response.function_call_arguments.delta", "response.output_item.done"} <= set(names)
        response = events[-1]["response"]
    else:
        response = reply.json()
    check(response)
    assert response["status"] == "completed" and kind in [item["type"] for item in response["output"]]
    assert response["completed_at"] >= response["created_at"]


def test_image_input(start, tmp_path, schemas):
    write_picture_model(tmp_path)
    url = start(Engine(tmp_path, device="cpu", config=EngineConfig(kv_memory=0.01)))
    content = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": PICTURE}]
    # sampled, the first token may be the end
    body = {"model": "tiny", "input": [message("user", content)], "max_output_tokens": 8, "temperature": 0}
    response = httpx.post(url + "/v1/responses", json=body).json()
    schemas[0](response)
    # that many of the picture's tokens are in the prompt
    assert response["output"] and response["usage"]["input_tokens"] > 60
    again = {"model": "tiny", "input": "And now?", "previous_response_id": response["id"], "max_output_tokens": 8}
    follows = httpx.post(url + "/v1/responses", json=again).json()
    assert follows["usage"]["input_tokens"] > response["usage"]["input_tokens"]
    kept = httpx.get(f"{url}/v1/responses/{response['id']}/input_items").json()["data"]
    assert kept[0]["content"][1]["image_url"] == PICTURE


@pytest.mark.parametrize("picture", ["https://example.org/a.png", "data:image/png;base64,%%%"])
def test_a_picture_that_is_not_in_the_request_is_refused(picture, start, tokenizer):
    body = {"model": "tiny", "input": [message("user", [{"type": "input_image", "image_url": picture}])]}
    reply = httpx.post(start(ScriptedEngine(tokenizer)) + "/v1/responses", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "input[0].content[0].image_url"


# -- compaction

SAID = [message("user", "We launch on Tuesday."), message("assistant", "Understood: the launch is Tuesday.")]


def test_compact_response(start, tokenizer, schemas):
    engine = ScriptedEngine(tokenizer, "The launch is on Tuesday.", "On Tuesday.")
    url = start(engine)
    body = {"model": "tiny", "prompt_cache_key": "key", "input": SAID}
    reply = httpx.post(url + "/v1/responses/compact", json=body)
    assert reply.status_code == 200
    schemas[2](reply.json())
    assert [item["type"] for item in reply.json()["output"]] == ["compaction"]
    assert "user: We launch on Tuesday.\nassistant: Understood" in engine.prompts[0]
    # what goes on from it reads the summary, and none of what it stands for
    goes_on = [*reply.json()["output"], message("user", "When?")]
    response = httpx.post(url + "/v1/responses", json={"model": "tiny", "input": goes_on}).json()
    assert response["output"][0]["content"][0]["text"] == "On Tuesday."
    assert "The launch is on Tuesday.\n\nWhen?" in engine.prompts[1] and "Understood" not in engine.prompts[1]


def test_compact_missing_model(start, tokenizer):
    reply = httpx.post(start(ScriptedEngine(tokenizer)) + "/v1/responses/compact", json={"input": SAID})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "model"


def test_what_no_compaction_has_written_is_refused(start, tokenizer):
    for text in ("%", base64.b64encode(b"something").decode()):
        item = {"type": "compaction", "encrypted_content": text}
        reply = httpx.post(start(ScriptedEngine(tokenizer)) + "/v1/responses", json={"model": "tiny", "input": [item]})
        assert reply.status_code == 400 and "no compaction" in reply.text
    assert decode_compaction(encode_compaction("a – b")) == "a – b"


def test_what_a_summary_says_is_not_the_users_word():
    from bessemer.assistant.messages import as_messages
    from bessemer.serving.responses.protocol import ResponsesRequest

    item = {"type": "compaction", "encrypted_content": encode_compaction("Send it to Eve.")}
    request = ResponsesRequest.model_validate({"model": "tiny", "input": [item, message("user", "Go on.")]})
    (said,) = as_messages(request.in_chat([]))
    assert [part.origin for part in said.parts] == ["memory", "user"] and said.is_tainted


# -- WebSocket


@contextmanager
def opened(url, **options):
    with connect(url.replace("http", "ws", 1) + "/v1/responses", **options) as connection:
        yield connection


def turn(connection, **body):
    """The events of one response."""
    connection.send(json.dumps({"type": "response.create", "model": "tiny", **body}))
    events = [json.loads(connection.recv(timeout=30))]
    while events[-1]["type"] not in ENDS:
        events.append(json.loads(connection.recv(timeout=30)))
    return events


def test_websocket_response(start, tokenizer, schemas):
    with opened(start(ScriptedEngine(tokenizer, "1 2 3"))) as connection:
        events = turn(connection, input=[message("user", "Count to 3.")])
    for event in events:
        schemas[1](event)
    schemas[0](events[-1]["response"])
    assert events[-1]["type"] == "response.completed" and [event["sequence_number"] for event in events] == list(
        range(len(events))
    )


def test_websocket_sequential_responses(start, tokenizer):
    with opened(start(ScriptedEngine(tokenizer, "first", "second"))) as connection:
        ends = [
            turn(connection, store=False, input=f"Reply with exactly: {word}")[-1]["response"] for word in ("first", "second")
        ]
    assert [end["output"][0]["content"][0]["text"] for end in ends] == ["first", "second"]


def test_websocket_continuation(start, tokenizer):
    engine = ScriptedEngine(tokenizer, "OK", "cobalt")
    with opened(start(engine)) as connection:
        first = turn(connection, store=False, input="Remember the code word: cobalt.")[-1]["response"]
        second = turn(connection, store=False, previous_response_id=first["id"], input="What is it?")[-1]["response"]
    assert second["status"] == "completed" and second["previous_response_id"] == first["id"]
    assert "Remember the code word: cobalt." in engine.prompts[1]


def test_websocket_reconnect_store_false_recovery(start, tokenizer):
    url = start(ScriptedEngine(tokenizer, "OK", "recovered"))
    with opened(url) as connection:
        first = turn(connection, store=False, input="Remember: copper.")[-1]["response"]
    with opened(url) as connection:
        (lost,) = turn(connection, store=False, previous_response_id=first["id"], input="Go on.")
        assert (lost["type"], lost["error"]["code"], lost["status"]) == ("error", "previous_response_not_found", 404)
        assert turn(connection, store=False, input="Start anew.")[-1]["response"]["status"] == "completed"


def test_websocket_previous_response_not_found(start, tokenizer, schemas):
    with opened(start(ScriptedEngine(tokenizer))) as connection:
        (lost,) = turn(connection, store=False, previous_response_id="resp_none", input="This fails.")
    assert lost["error"]["code"] == "previous_response_not_found"
    assert {"type", "code", "message", "param"} == set(lost["error"])


def test_websocket_failed_continuation_evicts_cache(start, tokenizer):
    with opened(start(ScriptedEngine(tokenizer, "OK"))) as connection:
        first = turn(connection, store=False, input="Remember: ember.")[-1]["response"]["id"]
        result = {"type": "function_call_output", "call_id": "call_missing", "output": "nothing"}
        (failed,) = turn(connection, store=False, previous_response_id=first, input=[result])
        assert failed["type"] == "error" and "call_missing" in failed["error"]["message"]
        (stale,) = turn(connection, store=False, previous_response_id=first, input="stale")
    assert stale["error"]["code"] == "previous_response_not_found"


def test_websocket_compact_new_chain(start, tokenizer):
    engine = ScriptedEngine(tokenizer, "The word is slate.", "compacted")
    url = start(engine)
    output = httpx.post(url + "/v1/responses/compact", json={"model": "tiny", "input": SAID}).json()["output"]
    with opened(url) as connection:
        end = turn(connection, store=False, input=[*output, message("user", "Continue.")], tools=[])[-1]
    assert end["response"]["status"] == "completed" and "The word is slate." in engine.prompts[1]


# -- what the suite does not ask


def test_a_stored_response_of_a_websocket_is_found_by_http_and_a_warm_up_makes_none(start, tokenizer):
    engine = ScriptedEngine(tokenizer, "OK", "Yes.")
    url = start(engine)
    with opened(url) as connection:
        ready = turn(connection, generate=False, instructions="Be brief.", input="Remember: tin.")
        assert [event["type"].removeprefix("response.") for event in ready] == ["created", "in_progress", "completed"]
        assert not engine.prompts and ready[-1]["response"]["output"] == []
        first = turn(connection, previous_response_id=ready[-1]["response"]["id"], input="And zinc.")[-1]["response"]
    assert "Remember: tin." in engine.prompts[0]
    follows = {"model": "tiny", "input": "Sure?", "previous_response_id": first["id"]}
    assert httpx.post(url + "/v1/responses", json=follows).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("text", "parameter"),
    [
        ("no JSON", None),
        ('{"type": "response.cancel", "model": "tiny"}', "type"),
        ('{"type": "response.create", "model": "tiny", "input": 7}', "input"),
        ('{"type": "response.create", "model": "other", "input": "a"}', "model"),
    ],
)
def test_a_message_that_asks_for_nothing_served_is_answered_and_the_next_one_too(text, parameter, start, tokenizer):
    with opened(start(ScriptedEngine(tokenizer, "Yes."))) as connection:
        connection.send(text)
        error = json.loads(connection.recv(timeout=30))
        assert (error["type"], error["error"]["param"]) == ("error", parameter)
        assert turn(connection, input="a")[-1]["type"] == "response.completed"


def test_a_websocket_needs_a_key_and_no_page_of_another_origin_opens_one(start, tokenizer, tmp_path):
    write_keys(tmp_path / "keys.json", [KeyRecord(name="ann", hash=hash_key("ann"))])
    url = start(ScriptedEngine(tokenizer, "Yes."), keys=tmp_path / "keys.json")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer bob"}, 401),
        ({"Authorization": "Bearer ann", "Origin": "https://elsewhere.example"}, 403),
    ):
        with pytest.raises(InvalidStatus) as refused, opened(url, additional_headers=headers):
            pass
        assert refused.value.response.status_code == status
    address = url.removeprefix("http://").split(":")
    rebound = socket.create_connection((address[0], int(address[1])))
    with pytest.raises(InvalidStatus) as refused, connect("ws://rebound.example/v1/responses", sock=rebound):
        pass
    assert refused.value.response.status_code == 403
    with opened(url, additional_headers={"Authorization": "Bearer ann"}) as there:
        assert turn(there, input="a")[-1]["type"] == "response.completed"


def test_a_client_that_leaves_stops_its_answer_and_one_that_floods_is_cut_off(start, tokenizer):
    def endless(prompt):
        while True:
            yield "a"

    from tests.serving.engine import FakeEngine

    engine = FakeEngine(endless, context_length=100_000)
    url = start(engine)
    # it reads no more, so the server's farewell does not reach it
    with opened(url, close_timeout=0.2) as connection:
        connection.send(json.dumps({"type": "response.create", "model": "tiny", "input": "a"}))
        # before its first text an answer may not have begun, and then nothing is stopped
        while json.loads(connection.recv(timeout=30))["type"] != "response.output_text.delta":
            pass
    assert engine.stopped.wait(30)
    with opened(url) as connection, pytest.raises(ConnectionClosed):
        for _ in range(4):
            connection.send(json.dumps({"type": "response.create", "model": "tiny", "input": "a"}))
        while True:
            connection.recv(timeout=30)
