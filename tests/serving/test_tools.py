"""Tools and thinking through OpenAI's own client: with a model that has learned nothing, and with one that is scripted."""

from __future__ import annotations

import json
from functools import partial

import jsonschema
import openai
import pytest

from bessemer.inference.engine import Engine
from bessemer.model.storage.folder import save_model
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.engine import ScriptedEngine

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name="weather", **changes):
    return {"type": "function", "function": {"name": name, "description": "What it is like.", "parameters": CITY, **changes}}


ASKED = [{"role": "user", "content": "Is it warm in Rome?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 1}}\n</tool_call>'
REQUEST = {"model": "tiny", "messages": ASKED, "tools": [tool()]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    folder = write_small_tokenizer(path / "tokenizer")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    save_model(random_decoder(shape), path / "model", tokenizer=folder)
    return Engine(path / "model", device="cpu")


@pytest.fixture
def connect(connected):
    """The official client of a server with an engine."""
    return partial(connected, openai.OpenAI, path="/v1")


def collected(stream):
    """A stream's choice as a whole: text, thinking, calls by index, and why it ended."""
    text, thinking, calls, reason = "", "", {}, None
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            assert delta.model_extra.get("reasoning") == delta.model_extra.get("reasoning_content")
            text, thinking = text + (delta.content or ""), thinking + (delta.model_extra.get("reasoning") or "")
            reason = choice.finish_reason or reason
            for call in delta.tool_calls or ():
                if call.index not in calls:
                    assert call.id and call.type == "function"
                    calls[call.index] = [call.id, call.function.name, ""]
                else:
                    assert (call.id, call.type, call.function.name) == (None, None, None)
                calls[call.index][2] += call.function.arguments
    return text, thinking, [tuple(call) for _, call in sorted(calls.items())], reason


# -- a model that has learned nothing


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}], ids=str)
def test_a_call_that_is_required_comes_and_fits_its_schema(connect, engine, choice):
    client = connect(engine)
    asked = REQUEST | {"tools": [tool(), tool("forecast")], "tool_choice": choice, "seed": 3, "temperature": 1.0}
    whole = client.chat.completions.create(**asked, n=3, parallel_tool_calls=False)
    for answer in whole.choices:
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert call.function.name == "forecast" or choice == "required"
        jsonschema.validate(json.loads(call.function.arguments), CITY)
    streamed = collected(client.chat.completions.create(**asked, parallel_tool_calls=False, stream=True))
    first = whole.choices[0].message.tool_calls[0]
    assert streamed == ("", "", [(first.id, first.function.name, first.function.arguments)], "tool_calls")


# -- one that says what it is told to


def test_calls_of_a_model_come_with_its_text_and_the_conversation_goes_on(connect, tokenizer):
    engine = ScriptedEngine(tokenizer, f"Let me see.\n{CALL}\n{CALL}", "It is warm.")
    client = connect(engine)
    answer = client.chat.completions.create(**REQUEST).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Let me see.", "tool_calls")
    calls = answer.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome", "days": 1}] * 2
    assert len({call.id for call in calls}) == 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in calls]
    said = client.chat.completions.create(**REQUEST | {"messages": [*ASKED, answer.message.model_dump(), *results]})
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("It is warm.", "stop")
    assert engine.prompts[1].count('"name": "weather", "arguments": {"city": "Rome", "days": 1}') == 2
    assert engine.prompts[1].count("21 degrees") == 2 and '"description": "What it is like."' in engine.prompts[1]


def test_a_stream_tells_calls_as_clients_expect(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer, f"Let me see.\n{CALL}\n{CALL}"))
    text, _, calls, reason = collected(client.chat.completions.create(**REQUEST, stream=True))
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == [("weather", {"city": "Rome", "days": 1})] * 2


@pytest.mark.parametrize("is_strict", [True, False])
def test_a_strict_tool_holds_what_the_model_may_write(connect, tokenizer, is_strict):
    engine = ScriptedEngine(tokenizer, "Yes.")
    connect(engine).chat.completions.create(**REQUEST | {"tools": [tool(strict=is_strict)]})
    assert ('"enum": ["Rome", "Oslo"]' in (engine.seen[0].ebnf or "")) == is_strict


def test_a_schema_that_calls_cannot_be_held_to_is_told_of_the_tools(connect, engine):
    never = {"type": "object", "properties": {"city": {"type": "string", "minLength": 9, "maxLength": 2}}, "required": ["city"]}
    with pytest.raises(openai.BadRequestError, match="tools: calls cannot be held to their schemas") as caught:
        connect(engine).chat.completions.create(**REQUEST | {"tools": [tool(parameters=never)], "tool_choice": "required"})
    assert caught.value.param == "tools"


def test_what_should_be_a_call_and_is_none_is_text(connect, tokenizer):
    bad = '<tool_call>\n{"name": "weather", "arguments": Rome}\n</tool_call>'
    client = connect(ScriptedEngine(tokenizer, bad, bad))
    answer = client.chat.completions.create(**REQUEST).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (bad, None, "stop")
    assert collected(client.chat.completions.create(**REQUEST, stream=True)) == (bad, "", [], "stop")


def test_a_call_in_a_block_of_code_is_a_call_unless_a_grammar_holds_the_answer(connect, tokenizer):
    """As Qwen2.5-Coder-1.5B-Instruct answered this question, sampled greedily."""
    written = '```json\n{\n  "name": "weather",\n  "arguments": {\n    "city": "Rome",\n    "days": 1\n  }\n}\n```'
    client = connect(ScriptedEngine(tokenizer, *[written] * 4))
    answer = client.chat.completions.create(**REQUEST).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
    streamed = collected(client.chat.completions.create(**REQUEST, stream=True))
    assert streamed[0] == "" and [(name, arguments) for _, name, arguments in streamed[2]] == [
        ("weather", call.function.arguments)
    ]
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 1}
    strict = client.chat.completions.create(**REQUEST | {"tools": [tool(strict=True)]}).choices[0]
    assert (strict.message.content, strict.finish_reason) == (written, "stop")
    none = client.chat.completions.create(**REQUEST | {"tool_choice": "none"}).choices[0]
    assert (none.message.content, none.finish_reason) == (written, "stop")


def test_without_tools_and_with_the_choice_of_none_nothing_is_a_call(connect, tokenizer):
    engine = ScriptedEngine(tokenizer, CALL, CALL)
    client = connect(engine)
    for asked in (REQUEST | {"tool_choice": "none"}, {"model": "tiny", "messages": ASKED}):
        answer = client.chat.completions.create(**asked).choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (CALL, None, "stop")
    assert all("What it is like" not in prompt for prompt in engine.prompts)


def test_thinking_is_apart_from_the_answer_in_both_spellings(connect, tagged_tokenizer):
    text = "<think>\nhm, 2\n</think>\n\nTwo."
    client = connect(ScriptedEngine(tagged_tokenizer, text, text, text))
    asked = {"model": "tiny", "messages": ASKED}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("Two.", "hm, 2", "hm, 2")
    assert whole.usage.completion_tokens_details.reasoning_tokens == len(tagged_tokenizer.encode("hm, 2", add_bos=False))
    assert collected(client.chat.completions.create(**asked, stream=True)) == ("Two.", "hm, 2", [], "stop")
    hidden = client.chat.completions.create(**asked, extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "Two." and not hasattr(hidden, "reasoning")


def test_a_tool_whose_schema_is_none_is_refused_by_name(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer))
    for tools, parameter in (
        ([tool(parameters={"type": "nothing"})], "tools[0].function.parameters"),
        ([tool(), tool()], "tools[1].function.name"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**REQUEST | {"tools": tools})
        assert caught.value.param == parameter
