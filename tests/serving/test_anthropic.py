"""Anthropic's API through its own client, and requests as a coding agent sends them."""

from __future__ import annotations

import json
from functools import partial

import anthropic
import httpx
import pytest

from bessemer.assistant.messages import as_messages, with_system_first
from bessemer.tokenization.folder import CHAT_TEMPLATE_FILE
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.tokenizers import write_small_tokenizer
from tests.serving.engine import FakeEngine, ScriptedEngine

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "What it is like.", "input_schema": CITY}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ASKED = {"model": "tiny", "max_tokens": 500, "messages": [{"role": "user", "content": "Is it warm in Rome?"}]}


@pytest.fixture
def connect(connected):
    """The official client of a server with an engine."""
    return partial(connected, anthropic.Anthropic)


def test_the_client_gets_a_whole_message_and_a_stream(connect, tokenizer):
    engine = ScriptedEngine(tokenizer, "It is warm.", "It is warm.")
    client = connect(engine)
    whole = client.messages.create(**ASKED, system="Be brief.")
    assert (whole.content[0].type, whole.content[0].text, whole.stop_reason) == ("text", "It is warm.", "end_turn")
    assert whole.usage.output_tokens == len("It is warm.") and whole.usage.input_tokens > 0
    assert "Be brief." in engine.prompts[0]
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == "It is warm."
        final = stream.get_final_message()
    assert (final.stop_reason, final.content[0].text) == ("end_turn", "It is warm.")
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_events_come_by_name_and_in_order(start, tagged_tokenizer):
    url = start(ScriptedEngine(tagged_tokenizer, f"<think>hm</think>\n\nLet me see.\n{CALL}"))
    answer = httpx.post(url + "/v1/messages?beta=true", json=ASKED | {"tools": [WEATHER], "stream": True})
    events = [tuple(line.partition(": ")[2] for line in event.split("\n")) for event in answer.text.strip().split("\n\n")]
    bodies = [json.loads(body) for _, body in events]
    assert [name for name, _ in events] == [body["type"] for body in bodies]
    kinds = [(body["type"], body.get("delta", body.get("content_block", {})).get("type"), body.get("index")) for body in bodies]
    kept = [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]
    assert kept == [
        ("message_start", None, None),
        ("content_block_start", "thinking", 0),
        ("content_block_delta", "thinking_delta", 0),
        ("content_block_delta", "signature_delta", 0),
        ("content_block_stop", None, 0),
        ("content_block_start", "text", 1),
        ("content_block_delta", "text_delta", 1),
        ("content_block_stop", None, 1),
        ("content_block_start", "tool_use", 2),
        ("content_block_delta", "input_json_delta", 2),
        ("content_block_stop", None, 2),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert bodies[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert bodies[-2]["usage"]["output_tokens"] > 0 and bodies[0]["message"]["content"] == []


def test_a_conversation_with_calls_and_their_results_goes_on(connect, tagged_tokenizer):
    engine = ScriptedEngine(tagged_tokenizer, f"<think>hm</think>\n\nLet me see.\n{CALL}", "21 degrees.")
    client = connect(engine)
    first = client.messages.create(**ASKED, tools=[WEATHER])
    thinking, text, use = first.content
    assert (thinking.thinking, text.text, use.name, use.input) == ("hm", "Let me see.", "weather", {"city": "Rome"})
    assert first.stop_reason == "tool_use" and thinking.signature
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "21"}], "is_error": False}
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "In Celsius?"}]},
    ]
    second = client.messages.create(**ASKED | {"messages": messages}, tools=[WEATHER])
    assert second.content[0].text == "21 degrees."
    prompt = engine.prompts[1]
    assert prompt.index('"arguments": {"city": "Rome"}') < prompt.index("21") < prompt.index("In Celsius?")


def test_a_tool_may_be_required(connect, tokenizer):
    for choice, forced in (({"type": "any"}, True), ({"type": "tool", "name": "weather"}, True), ({"type": "auto"}, False)):
        engine = ScriptedEngine(tokenizer, CALL)
        connect(engine).messages.create(**ASKED, tools=[WEATHER], tool_choice=choice)
        assert (engine.seen[0].ebnf is not None) == forced
    engine = ScriptedEngine(tokenizer, CALL)
    answer = connect(engine).messages.create(**ASKED, tools=[WEATHER], tool_choice={"type": "none"})
    assert answer.content[0].text == CALL and "What it is like" not in engine.prompts[0]


def test_thinking_is_switched_off_and_has_a_budget(connect, thinking_tokenizer):
    engine = ScriptedEngine(thinking_tokenizer, "Yes.", "hm</think>Yes.")
    client = connect(engine)
    client.messages.create(**ASKED, thinking={"type": "disabled"})
    client.messages.create(**ASKED, thinking={"type": "enabled", "budget_tokens": 300})
    assert [params.max_tokens for params in engine.seen] == [500, 300]


def test_a_stop_sequence_is_named(connect):
    answer = connect(StoppedEngine()).messages.create(**ASKED | {"max_tokens": 50}, stop_sequences=["END", "warm"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "warm", "user: Is it ")


class StoppedEngine(FakeEngine):
    """Stops behind the word that it is to stop at, as the engine does."""

    def __init__(self):
        super().__init__(lambda prompt: iter(prompt.splitlines()[-1].partition("warm")[0] + "warm"))


def test_tokens_are_counted_with_tools_and_system(connect, tokenizer):
    engine = ScriptedEngine(tokenizer, "Yes.")
    client = connect(engine)
    asked = {"model": "tiny", "messages": ASKED["messages"], "system": "Be brief.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == client.messages.create(**asked, max_tokens=5).usage.input_tokens
    assert counted > client.messages.count_tokens(model="tiny", messages=ASKED["messages"]).input_tokens


#: What Claude Code sends besides the conversation.
AGENT = {
    "model": "tiny",
    "max_tokens": 500,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f0c3;"},
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "How warm is it?", "cache_control": {"type": "ephemeral"}}]}
    ],
    "tools": [
        WEATHER | {"cache_control": {"type": "ephemeral"}, "eager_input_streaming": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "metadata": {"user_id": "user_1"},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}


def test_an_agents_request_is_answered_with_a_call(start, tokenizer):
    engine = ScriptedEngine(tokenizer, CALL, CALL)
    url = start(engine)
    assert httpx.head(url + "/").status_code == 200
    for mark in ("1f0c3", "77aa0"):
        request = json.loads(json.dumps(AGENT).replace("1f0c3", mark))
        answer = httpx.post(url + "/v1/messages?beta=true", json=request, headers={"anthropic-version": "2023-06-01"})
        assert answer.status_code == 200 and '"type": "tool_use"' in answer.text, answer.text
        assert answer.text.rstrip().endswith('{"type": "message_stop"}')
    # what changes with every request would find nothing in the prefix cache
    assert engine.prompts[0] == engine.prompts[1] and "billing" not in engine.prompts[0]
    assert "You are a coding agent." in engine.prompts[0] and "web_search" not in engine.prompts[0]


@pytest.fixture
def strict_tokenizer(tokenizer, tmp_path):
    """A tokenizer whose template takes a system message at the beginning alone, and no two messages of a role in a row."""
    folder = write_small_tokenizer(tmp_path / "strict")
    (folder / CHAT_TEMPLATE_FILE).write_text(
        "{% for message in messages %}"
        "{% if message.role == 'system' and not loop.first %}{{ raise_exception('a system message must be first') }}{% endif %}"
        "{% if not loop.first and messages[loop.index0 - 1].role == message.role %}{{ raise_exception('twice') }}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        encoding="utf-8",
    )
    return load_tokenizer(folder)


#: As Claude Code sends it, with the beta `mid-conversation-system-2026-04-07`.
WITH_SYSTEM = [
    {"role": "user", "content": [{"type": "text", "text": "How warm is it?"}]},
    {"role": "system", "content": [{"type": "text", "text": "Use tools.", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": "21 degrees."},
    {"role": "user", "content": "And now?"},
    {"role": "system", "content": "Be brief."},
]


def test_a_system_message_in_the_middle_stands_where_the_template_takes_it(start, tokenizer, strict_tokenizer):
    asked = ASKED | {"system": "You are an agent.", "messages": WITH_SYSTEM}
    prompts = []
    for one in (tokenizer, strict_tokenizer):
        engine = ScriptedEngine(one, "22.")
        beta = {"anthropic-beta": "mid-conversation-system-2026-04-07"}
        answer = httpx.post(start(engine) + "/v1/messages?beta=true", json=asked, headers=beta)
        assert answer.status_code == 200 and answer.json()["content"][0]["text"] == "22.", answer.text
        prompts.append(engine.prompts[0])
    turns = (
        "system|You are an agent.|user|How warm is it?|system|Use tools.|assistant|21 degrees.|user|And now?|system|Be brief."
    )
    assert prompts == [f"{text}|assistant|".replace("|", "\n") for text in (turns, turns.replace("?|system|", "?||"))]


def test_system_messages_join_the_users_messages_on_both_sides():
    given = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("system", "e"), ("user", "f"), ("assistant", "g")]
    messages = as_messages([{"role": role, "content": text} for role, text in [*given, ("system", "h"), ("user", "i")]])
    placed = with_system_first(messages)
    assert [(one.role, one.text) for one in placed] == [
        ("system", "a\n\nb"),
        ("user", "c"),
        ("user", "d\n\ne\n\nf"),
        ("assistant", "g"),
        ("user", "h\n\ni"),
    ]
    assert [part.origin for part in placed[2].parts] == ["user", "system", "system", "system", "user"]


def test_an_answer_goes_on_from_what_it_is_given_to_begin_with(connect, tokenizer, thinking_tokenizer):
    begun = [*ASKED["messages"], {"role": "assistant", "content": "It is"}]
    engine = ScriptedEngine(tokenizer, " warm.", " warm.")
    client = connect(engine)
    whole = client.messages.create(**ASKED | {"messages": begun})
    assert whole.content[0].text == " warm." and engine.prompts[0].endswith("assistant\nIt is")
    counted = client.messages.count_tokens(model="tiny", messages=begun).input_tokens
    assert whole.usage.input_tokens == counted
    with client.messages.stream(**ASKED | {"messages": begun}) as stream:
        assert "".join(stream.text_stream) == " warm."
    # of a model that always thinks, the thinking is over, and is what the message says of it
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    with_thinking = [*ASKED["messages"], {"role": "assistant", "content": [thought, {"type": "text", "text": "It is"}]}]
    for messages, written in ((begun, "<think>\n</think>\n\nIt is"), (with_thinking, "<think>\nhm</think>\n\nIt is")):
        engine = ScriptedEngine(thinking_tokenizer, " warm.")
        answer = connect(engine).messages.create(**ASKED | {"messages": messages})
        assert [block.type for block in answer.content] == ["text"] and answer.content[0].text == " warm."
        assert engine.prompts[0].endswith(f"assistant\n{written}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"mcp_servers": [{"url": "http://elsewhere"}]}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tool_choice": {"type": "tool", "name": "weather"}}, "weather"),
        ({"tools": [WEATHER | {"input_schema": {"type": "nothing"}}]}, "not valid"),
        ({"model": "other"}, "does not exist"),
    ],
)
def test_what_is_not_served_is_refused_in_anthropics_form(connect, tokenizer, changes, words):
    client = connect(ScriptedEngine(tokenizer))
    kind = anthropic.NotFoundError if "model" in changes else anthropic.BadRequestError
    with pytest.raises(kind) as caught:
        client.post("/v1/messages", body=ASKED | changes, cast_to=object)
    error = caught.value.body
    assert error["type"] == "error" and words in error["error"]["message"] and error["request_id"].startswith("req_")


def test_a_key_is_taken_as_anthropics_clients_send_it(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer, "Yes."), api_key="secret")
    assert client.messages.create(**ASKED).content[0].text == "Yes."
    url = str(client.base_url).rstrip("/")
    refused = httpx.post(url + "/v1/messages", json=ASKED, headers={"x-api-key": "guess"})
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
