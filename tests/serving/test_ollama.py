"""Ollama's API through its own client."""

from __future__ import annotations

import json

import httpx
import ollama
import pytest

from bessemer.serving.ollama.protocol import ChatBody, Options
from bessemer.serving.runtime import streams
from bessemer.serving.runtime.bodies import ApiError, read_request
from tests.serving.engine import FakeEngine, ScriptedEngine
from tests.serving.running import babbling_engine

QUESTION = [{"role": "user", "content": "Is it warm in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def connect(start):
    """The official client of a server with an engine, whose model has the sampling settings of its folder."""

    def connected(engine, own=None, **settings):
        if not hasattr(engine, "sampling_settings"):
            engine.sampling_settings = own or {}
        return ollama.Client(host=start(engine, **settings))

    return connected


def test_the_client_gets_a_whole_answer_and_a_stream(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer, "It is warm.", "It is warm."))
    whole = client.chat("tiny", QUESTION)
    assert (whole.message.content, whole.done, whole.done_reason) == ("It is warm.", True, "stop")
    assert whole.eval_count == len("It is warm.") and whole.prompt_eval_count > 0
    assert 0 < whole.prompt_eval_duration + whole.eval_duration <= whole.total_duration
    parts = list(client.chat("tiny:latest", QUESTION, stream=True))
    assert "".join(part.message.content for part in parts) == "It is warm."
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count


def test_thinking_and_calls_come_apart_and_a_result_goes_back_to_its_call(connect, tagged_tokenizer):
    engine = ScriptedEngine(tagged_tokenizer, f"<think>hm</think>\n\nLet me see.\n{CALL}", "21 degrees.")
    client = connect(engine)
    first = client.chat("tiny", QUESTION, tools=[WEATHER])
    assert (first.message.thinking, first.message.content) == ("hm", "Let me see.")
    (call,) = first.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Rome"})
    result = {"role": "tool", "content": "21", "tool_name": "weather"}
    second = client.chat("tiny", [*QUESTION, first.message, result], tools=[WEATHER])
    assert second.message.content == "21 degrees."
    assert '"city": "Rome"' in engine.prompts[1] and "21" in engine.prompts[1]


def test_results_answer_the_calls_of_their_tool_in_order():
    def call(name, city):
        return {"function": {"name": name, "arguments": {"city": city}}}

    messages = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call("weather", "Rome"), call("clock", "Rome"), call("weather", "Oslo")]},
        {"role": "tool", "content": "noon", "tool_name": "clock"},
        {"role": "tool", "content": "21", "tool_name": "weather"},
        {"role": "tool", "content": "3"},
    ]
    shown = read_request(ChatBody, json.dumps({"model": "tiny", "messages": messages}).encode()).in_chat()
    names = {one["id"]: json.loads(one["function"]["arguments"]) for one in shown[1]["tool_calls"]}
    assert [(names[one["tool_call_id"]]["city"], one["content"]) for one in shown[2:]] == [
        ("Rome", "noon"),
        ("Rome", "21"),
        ("Oslo", "3"),
    ]


def test_a_prompt_goes_through_the_chat_template_or_as_it_is(connect):
    engine = FakeEngine(lambda prompt: iter([prompt.upper()]))
    client = connect(engine)
    assert client.generate("tiny", "hello", system="Be loud.").response == "SYSTEM: BE LOUD.\nUSER: HELLO\n"
    raw = client.generate("tiny", "hello", raw=True)
    assert (raw.response, raw.done_reason, raw.prompt_eval_count) == ("HELLO", "stop", 6)
    streamed = list(client.generate("tiny", "hello", raw=True, stream=True))
    assert "".join(part.response for part in streamed) == "HELLO" and streamed[-1].done


def test_options_are_the_engines_settings_over_the_models_own_over_ollamas_defaults(connect):
    engine = FakeEngine()
    client = connect(engine, own={"top_p": 0.8})
    client.chat("tiny", QUESTION, options={"repeat_penalty": 1.5, "seed": -1, "num_ctx": 4096, "num_predict": 3, "stop": ["x"]})
    (params,) = engine.seen
    assert (params.temperature, params.top_k, params.top_p) == (0.8, 40, 0.8)
    assert (params.repetition_penalty, params.seed, params.max_tokens, params.stop) == (1.5, None, 3, ["x"])
    client.chat("tiny", QUESTION, options={"num_predict": -1, "temperature": 0}, format="json")
    assert engine.seen[1].max_tokens > 3 and engine.seen[1].greedy and engine.seen[1].json_schema == {"type": "object"}


def test_what_is_not_supported_is_refused_by_name_in_ollamas_form(start):
    engine = FakeEngine()
    engine.sampling_settings = {}
    url = start(engine)
    for body, status, reason in (
        ({"model": "other", "messages": QUESTION}, 404, "the model 'other' does not exist; this server has 'tiny'"),
        ({"model": "tiny", "messages": QUESTION, "options": {"mirostat": 2}}, 400, "options.mirostat"),
        ({"model": "tiny", "messages": [{"role": "user", "images": ["AAAA"]}]}, 400, "messages[0].images"),
        ({"model": "tiny", "messages": [{"role": "tool", "content": "21"}]}, 400, "messages[0] is the result of no call"),
        ({"model": "tiny", "messages": QUESTION, "options": {"top_p": 0}}, 400, "options.top_p"),
    ):
        answer = httpx.post(f"{url}/api/chat", json=body)
        assert answer.status_code == status and list(answer.json()) == ["error"]
        assert reason in answer.json()["error"]
    assert "error" in httpx.post(f"{url}/api/pull", json={"model": "tiny"}).json()


def test_a_request_without_a_question_loads_the_model(connect):
    client = connect(FakeEngine())
    assert client.chat("tiny", []).done_reason == "load"
    assert client.generate("tiny").done_reason == "load"


def test_silence_is_broken_by_a_line_that_adds_nothing(start, tokenizer, monkeypatch):
    monkeypatch.setattr(streams, "QUIET_SECONDS", 0.01)
    engine = ScriptedEngine(tokenizer, "Warm.")
    engine.sampling_settings = {}
    step = engine.step

    def slow_step():
        import time

        time.sleep(0.05)
        step()

    engine.step = slow_step
    with httpx.stream("POST", f"{start(engine)}/api/chat", json={"model": "tiny", "messages": QUESTION}) as answer:
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        parts = [json.loads(line) for line in answer.iter_lines()]
    assert "".join(part["message"]["content"] for part in parts) == "Warm."
    assert len(parts) > len("Warm.") + 1


def test_a_real_engine_is_listed_shown_embeds_and_gives_log_probabilities(connect, tmp_path):
    engine = babbling_engine(tmp_path)
    client = connect(engine)
    (listed,) = client.list().models
    assert listed.model == "tiny" and listed.size == sum(each.numel() * 4 for each in engine.model.parameters())
    shown = client.show("tiny")
    assert shown.modelinfo["general.parameter_count"] == engine.model.config.parameters()
    assert "completion" in shown.capabilities and client.ps().models[0].context_length == engine.context_length
    vectors = client.embed("tiny", ["iron", "steel"]).embeddings
    assert [round(sum(value * value for value in vector), 4) for vector in vectors] == [1, 1]
    # without compiled kernels a text beside another has other last digits than alone
    assert client.embeddings("tiny", "iron").embedding == pytest.approx(vectors[0], abs=1e-6)
    short = client.embed("tiny", "iron", dimensions=4).embeddings[0]
    assert len(short) == 4 and round(sum(value * value for value in short), 4) == 1
    made = client.generate("tiny", "iron", raw=True, options={"num_predict": 4}, logprobs=True, top_logprobs=2)
    assert len(made.logprobs) == made.eval_count <= 4 and all(len(token.top_logprobs) == 2 for token in made.logprobs)
    with pytest.raises(ollama.ResponseError, match="context is"):
        client.embed("tiny", "iron " * 1000, truncate=False)


def test_a_missing_option_keeps_the_models_and_a_given_one_is_checked():
    assert Options.model_validate({}).sampling({"temperature": 0.2}, 5).temperature == 0.2
    with pytest.raises(ApiError, match=r"options\.temperature"):
        read_request(ChatBody, json.dumps({"model": "tiny", "options": {"temperature": 9}}).encode())
