"""`/v1/responses` through OpenAI's own client, and as an agent sends its requests."""

from __future__ import annotations

import json
from functools import partial

import httpx
import openai
import pytest

from bessemer.serving.runtime.clients import KeyRecord, hash_key, write_keys
from tests.serving.engine import ScriptedEngine

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "What it is like.", "parameters": CITY}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ASKED = {"model": "tiny", "input": "Is it warm in Rome?"}


@pytest.fixture
def connect(connected):
    """The official client of a server with an engine."""
    return partial(connected, openai.OpenAI, path="/v1")


def test_the_client_gets_a_response_and_may_ask_for_it_again(connect, tokenizer):
    engine = ScriptedEngine(tokenizer, "It is warm.", "21 degrees.")
    client = connect(engine)
    first = client.responses.create(**ASKED, instructions="Be brief.", metadata={"run": "7"})
    assert (first.output_text, first.status, first.metadata) == ("It is warm.", "completed", {"run": "7"})
    assert first.usage.output_tokens == len("It is warm.") and first.usage.total_tokens > first.usage.output_tokens
    assert client.responses.retrieve(first.id).output_text == "It is warm."
    second = client.responses.create(model="tiny", input="How warm?", previous_response_id=first.id)
    assert second.output_text == "21 degrees." and second.previous_response_id == first.id
    # what was said is in the conversation, and the instructions of before are not
    prompt = engine.prompts[1]
    assert prompt.index("Is it warm in Rome?") < prompt.index("It is warm.") < prompt.index("How warm?")
    assert "Be brief." in engine.prompts[0] and "Be brief." not in prompt
    assert client.responses.input_items.list(first.id).data[0].content[0].text == "Is it warm in Rome?"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(first.id)


def test_a_response_that_goes_on_from_its_input_is_kept_as_one_message(connect, tokenizer):
    engine = ScriptedEngine(tokenizer, " warm.", "Yes.")
    client = connect(engine)
    said = [{"role": "user", "content": "Is it warm in Rome?"}, {"role": "assistant", "content": "It is"}]
    first = client.responses.create(model="tiny", input=said)
    assert first.output_text == " warm." and engine.prompts[0].endswith("assistant\nIt is")
    client.responses.create(model="tiny", input="Sure?", previous_response_id=first.id)
    assert "assistant\nIt is warm.\nuser\nSure?" in engine.prompts[1]


def test_a_response_is_its_owners_and_one_that_is_not_stored_is_nobodys(start, tokenizer, tmp_path):
    write_keys(tmp_path / "keys.json", [KeyRecord(name=name, hash=hash_key(name)) for name in ("ann", "bob")])
    url = start(ScriptedEngine(tokenizer, "Yes.", "Yes."), keys=tmp_path / "keys.json")
    ann = {"Authorization": "Bearer ann"}
    kept = httpx.post(url + "/v1/responses", json=ASKED, headers=ann).json()["id"]
    lost = httpx.post(url + "/v1/responses", json=ASKED | {"store": False}, headers=ann).json()["id"]
    for identity, key, status in ((kept, "ann", 200), (kept, "bob", 404), (lost, "ann", 404)):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/v1/responses/{identity}", headers=headers).status_code == status
        follows = ASKED | {"previous_response_id": identity}
        if status == 404:
            assert httpx.post(url + "/v1/responses", json=follows, headers=headers).status_code == 404


def test_events_come_in_order_and_the_client_reads_them(connect, tagged_tokenizer):
    client = connect(ScriptedEngine(tagged_tokenizer, f"<think>hm</think>\n\nLet me see.\n{CALL}"))
    with client.responses.stream(**ASKED, tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"),
        *("output_item.done", "output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    thinking, message, call = final.output
    assert (thinking.content[0].text, message.content[0].text) == ("hm", "Let me see.")
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    told = {event.item.id for event in events if event.type == "response.output_item.added"}
    assert told == {item.id for item in final.output}
    assert final.usage.output_tokens_details.reasoning_tokens > 0


def test_a_conversation_with_calls_goes_on_in_items(connect, tagged_tokenizer):
    engine = ScriptedEngine(tagged_tokenizer, f"<think>hm</think>\n\n{CALL}", "21 degrees.")
    client = connect(engine)
    first = client.responses.create(**ASKED, tools=[WEATHER])
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    given = [
        {"role": "user", "content": ASKED["input"]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        result,
    ]
    second = client.responses.create(model="tiny", input=given, tools=[WEATHER])
    assert second.output_text == "21 degrees."
    assert '"name": "weather", "arguments": {"city": "Rome"}' in engine.prompts[1] and "21" in engine.prompts[1]
    follows = ScriptedEngine(tagged_tokenizer, CALL, "21 degrees.")
    client = connect(follows)
    first = client.responses.create(**ASKED, tools=[WEATHER])
    answer = client.responses.create(
        model="tiny",
        input=[{"type": "function_call_output", "call_id": first.output[0].call_id, "output": "21"}],
        previous_response_id=first.id,
        tools=[WEATHER],
    )
    assert answer.output_text == "21 degrees." and follows.prompts[1] == engine.prompts[1].replace("hm", "")


def test_an_answer_that_is_cut_says_why(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer, "It is warm."))
    cut = client.responses.create(**ASKED, max_output_tokens=5)
    assert (cut.status, cut.incomplete_details.reason, cut.output_text) == ("incomplete", "max_output_tokens", "It is")


def test_a_form_a_choice_and_an_effort_reach_the_engine(connect, thinking_tokenizer, tokenizer):
    engine = ScriptedEngine(tokenizer, "{}", CALL)
    client = connect(engine)
    form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    client.responses.create(**ASKED, text={"format": form})
    client.responses.create(**ASKED, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
    assert engine.seen[0].json_schema == CITY and "weather" in engine.seen[1].ebnf
    engine = ScriptedEngine(thinking_tokenizer, "hm</think>Yes.")
    connect(engine).responses.create(**ASKED, reasoning={"effort": "low", "summary": "auto"})
    assert engine.seen[0].max_tokens == 1024


#: What Codex sends besides the conversation.
AGENT = {
    "model": "tiny",
    "instructions": "You are a coding agent.",
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How warm is it?"}]}],
    "tools": [
        WEATHER | {"strict": False},
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "namespace", "name": "files", "tools": []},
        {"type": "image_generation", "output_format": "png"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "client_metadata": {"x": "y"},
    "text": {"verbosity": "medium"},
}


def test_an_agents_request_is_answered_with_a_call_and_its_probe_with_nothing(start, tokenizer):
    engine = ScriptedEngine(tokenizer, CALL)
    url = start(engine)
    answer = httpx.post(url + "/v1/responses", json=AGENT)
    bodies = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: ")]
    (call,) = bodies[-1]["response"]["output"]
    assert bodies[-1]["type"] == "response.completed" and (call["type"], call["name"]) == ("function_call", "weather")
    assert "apply_patch" not in engine.prompts[0] and "You are a coding agent." in engine.prompts[0]
    probe = httpx.post(url + "/v1/responses", json=AGENT | {"input": []})
    assert probe.status_code == 200 and probe.text.count("event: ") == 3 and '"output": []' in probe.text
    assert len(engine.prompts) == 1


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "hammer"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER | {"parameters": {"type": "nothing"}}]}, "tools[0].parameters"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_name(connect, tokenizer, changes, parameter):
    client = connect(ScriptedEngine(tokenizer))
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body=ASKED | changes, cast_to=object)
    assert caught.value.param == parameter
