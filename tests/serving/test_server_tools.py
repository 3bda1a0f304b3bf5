"""Tools that the server runs: clients see the answer alone, through each of its APIs, and their own tools stay theirs."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest

from bessemer.assistant.tools import Tool
from tests.serving.engine import ScriptedEngine

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "mail", "arguments": {}}\n</tool_call>'
ASKED = [{"role": "user", "content": "Is it warm in Rome?"}]
MAIL = {"type": "function", "function": {"name": "mail", "description": "Sends.", "parameters": {"type": "object"}}}


class Source:
    """The server's tools, and the questions for which they were asked."""

    def __init__(self):
        self.questions, self.cities = [], []

    def weather(self, city):
        self.cities.append(city)
        return "21 degrees"

    def __call__(self, question):
        self.questions.append(question)
        return [Tool("weather", "The weather.", CITY, self.weather)]


@pytest.fixture
def source():
    return Source()


def engine(tokenizer, *texts):
    return ScriptedEngine(tokenizer, *texts)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_s_client_gets_the_answer_alone(connected, tokenizer, source, stream):
    made = engine(tokenizer, CALL, "It is warm.")
    client = connected(openai.OpenAI, made, path="/v1", server_tools=source)
    answer = client.chat.completions.create(model="tiny", messages=ASKED, stream=stream)
    if stream:
        deltas = [choice for chunk in answer for choice in chunk.choices]
        assert not any(choice.delta.tool_calls for choice in deltas)
        text, reason = "".join(choice.delta.content or "" for choice in deltas), deltas[-1].finish_reason
    else:
        (choice,) = answer.choices
        assert choice.message.tool_calls is None
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == ("It is warm.", "stop")
    assert source.questions == ["Is it warm in Rome?"] and source.cities == ["Rome"]
    assert "21 degrees" in made.prompts[1] and '"weather"' in made.prompts[0]


def test_the_other_apis_get_it_too(connected, tokenizer, source):
    made = engine(tokenizer, CALL, "It is warm.", CALL, "It is warm.")
    client = connected(openai.OpenAI, made, path="/v1", server_tools=source)
    assert client.responses.create(model="tiny", input="Is it warm?").output_text == "It is warm."
    other = anthropic.Anthropic(base_url=str(client.base_url).removesuffix("/v1/"), api_key="any", max_retries=0)
    message = other.messages.create(model="tiny", max_tokens=200, messages=ASKED)
    assert [block.text for block in message.content] == ["It is warm."] and message.stop_reason == "end_turn"


def test_a_client_s_own_tools_are_still_the_client_s(connected, tokenizer, source):
    made = engine(tokenizer, CALL, OTHER)
    client = connected(openai.OpenAI, made, path="/v1", server_tools=source)
    (choice,) = client.chat.completions.create(model="tiny", messages=ASKED, tools=[MAIL]).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["mail"] and choice.finish_reason == "tool_calls"
    # of two tools of one name, the client's is meant
    weather = {"type": "function", "function": {**MAIL["function"], "name": "weather"}}
    made.texts.append(CALL)
    (choice,) = client.chat.completions.create(model="tiny", messages=ASKED, tools=[weather]).choices
    assert choice.message.tool_calls[0].function.name == "weather" and source.cities == ["Rome"]


def test_none_are_offered_where_the_client_wants_no_calls(connected, tokenizer, source):
    made = engine(tokenizer, "Hello.", "Hello.")
    client = connected(openai.OpenAI, made, path="/v1", server_tools=source)
    client.chat.completions.create(model="tiny", messages=ASKED, tool_choice="none", tools=[MAIL])
    client.responses.create(model="tiny", input="Hello", tool_choice="none")
    assert source.questions == [] and "weather" not in made.prompts[0] + made.prompts[1]


def test_tokens_are_counted_with_the_server_s_tools(start, tokenizer, source):
    body = {"model": "tiny", "messages": ASKED}
    with_tools, without = (
        httpx.post(start(engine(tokenizer), **options) + "/v1/messages/count_tokens", json=body).json()["input_tokens"]
        for options in ({"server_tools": source}, {})
    )
    assert with_tools > without
