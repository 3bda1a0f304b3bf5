"""Which requests are served, and how the others are told which parameter is to blame."""

from __future__ import annotations

import asyncio
import json
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bessemer.inference.sampling.sampler import SamplingParams
from bessemer.serving.config import FIELDS, METADATA, PARSED_AT_ONCE
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest
from bessemer.serving.responses.protocol import ResponsesRequest
from bessemer.serving.runtime import bodies
from bessemer.serving.runtime.bodies import ApiError, few_pairs, read_request

TOOL = {"type": "function", "function": {"name": "add"}}
USER = {"role": "user", "content": "hi"}


def chat(**changes) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"model": "m", "messages": [USER], **changes}).encode())


def complete(**changes) -> CompletionRequest:
    return read_request(CompletionRequest, json.dumps({"model": "m", "prompt": "hi", **changes}).encode())


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOL | {"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": 4, "reasoning_effort": "low"}, "thinking_budget"),
        ({"reasoning_effort": "vast"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"date": "today"}}, "chat_template_kwargs.date"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [f"text {number}" for number in range(100_000)]}, "guided_choice"),
        ({"structured_outputs": {"choice": ["a" * 300_000]}}, "structured_outputs"),
        ({"guided_grammar": 'start: "a"' + " " * 300_000}, "guided_grammar"),
        ({"guided_json": {"enum": ["a" * 300_000]}}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
        ({"min_p": 1.5}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 3}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "stream_options": {"colour": "red"}}, "stream_options.colour"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "function", "content": "4"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id"),
        ({"messages": [{**USER, "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{**USER, "reasoning": "hm"}]}, "messages[0].reasoning"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{**USER, "name": 3}]}, "messages[0].name"),
        ({"verbosity": "endless"}, "verbosity"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes, parameter):
    with pytest.raises(ApiError) as caught:
        chat(**changes)
    assert caught.value.status == 400
    assert caught.value.parameter == parameter
    assert parameter in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"suffix": "end", "echo": True}, "suffix"),
        ({"suffix": "end", "prompt": [1, 2]}, "suffix"),
        ({"suffix": 5}, "suffix"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ],
)
def test_what_a_plain_completion_does_not_take_is_refused_by_name(changes, parameter):
    with pytest.raises(ApiError) as caught:
        complete(**changes)
    assert (caught.value.status, caught.value.parameter) == (400, parameter)
    assert parameter in str(caught.value)


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_parameter_is_named(name):
    with pytest.raises(ApiError) as caught:
        chat(**{name: None})
    assert (caught.value.parameter, caught.value.code) == (name, "missing_required_parameter")


@given(st.text(min_size=1), st.one_of(st.integers(), st.text(), st.booleans(), st.lists(st.integers())))
def test_no_parameter_is_ignored(name, value):
    """Unknown to us, whatever its name and value: refused, and the refusal is JSON."""
    name = "x_" + name
    with pytest.raises(ApiError) as caught:
        chat(**{name: value})
    assert caught.value.parameter == name
    json.dumps(caught.value.body())


def test_values_that_ask_for_nothing_are_accepted():
    neutral = {
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logprobs": False,
        "top_logprobs": None,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "user": "somebody",
        "seed": None,
        "top_k": -1,
        "stream_options": None,
        "store": False,
    }
    assert chat(**neutral) == chat()


def test_every_setting_reaches_the_engine_under_its_name():
    settings = {
        "n": 3,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": 5,
        "stop": ["x"],
        "stop_token_ids": [3],
        "ignore_eos": True,
    }
    expected = SamplingParams(
        max_tokens=9, logit_bias={5: -100}, allowed_tokens=[1, 2], logprobs=4, prompt_logprobs=4, best_of=6, **settings
    )
    theirs = {"logit_bias": {"5": -100}, "allowed_token_ids": [1, 2], "logprobs": 4, "echo": True, "best_of": 6}
    assert complete(**settings, **theirs).sampling(9) == expected


def test_chat_asks_for_log_probabilities_in_two_parameters():
    assert chat().sampling(5).logprobs is None
    assert chat(logprobs=True).sampling(5).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling(5).logprobs == 3


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}}},
            ("json_schema", SCHEMA),
        ),
        ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["yes", "no"]}, ("choice", ["yes", "no"])),
        ({"guided_grammar": 'start: "a"'}, ("ebnf", 'start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", {"type": "object"})),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes"]}}, ("choice", ["yes"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("ebnf", 'start: "a"')),
    ],
)
def test_what_the_text_must_look_like_reaches_the_engine(asked, grammar):
    assert chat(**asked).sampling(5).grammar == complete(**asked).sampling(5).grammar == grammar


def test_more_tokens_at_least_than_at_most_are_refused_by_name():
    with pytest.raises(ApiError) as caught:
        complete(min_tokens=17).sampling(16)
    assert (caught.value.status, caught.value.parameter) == (400, "min_tokens")


def test_answer_sent_back_by_openais_client_is_a_message():
    sent = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert chat(messages=[USER, sent]).messages[1].content == "yes"


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"


def test_developer_speaks_as_system():
    assert chat(messages=[{"role": "developer", "content": "x"}]).messages[0].as_template_input()["role"] == "system"


def test_differing_limits_are_refused_and_equal_ones_are_one():
    assert chat(max_tokens=5, max_completion_tokens=5).token_limit == 5
    with pytest.raises(ApiError, match="max_completion_tokens"):
        chat(max_tokens=5, max_completion_tokens=6)


def test_stream_options_without_a_stream_are_refused():
    with pytest.raises(ApiError, match="stream_options"):
        chat(stream_options={"include_usage": True})


@pytest.mark.parametrize(
    ("given", "taken"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_are_texts_or_token_ids_one_or_several(given, taken):
    assert complete(prompt=given).prompt == taken


@pytest.mark.parametrize("given", [[], [[]], [[1], []], ["a", [1]], [1, "a"], {"a": 1}, [1.5], [[True]], ["a"] * 3000])
def test_other_prompts_are_refused(given):
    with pytest.raises(ApiError) as caught:
        complete(prompt=given)
    assert (caught.value.status, caught.value.parameter) == (400, "prompt")


@pytest.mark.parametrize(
    ("request_of", "given"), [(ChatRequest, {"messages": [1] * 5}), (CompletionRequest, {"prompt": "a", "stop": [1] * 5})]
)
def test_the_check_of_a_list_ends_at_its_first_wrong_item(request_of, given):
    with pytest.raises(ValidationError) as refused:
        request_of.model_validate({"model": "m"} | given)
    assert refused.value.error_count() == 1


@pytest.mark.parametrize(
    ("request_of", "given", "parameter"),
    [
        (CompletionRequest, {"prompt": "a", "stop": ["a", 5]}, "stop[1]"),
        (ResponsesRequest, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ],
)
def test_of_what_may_be_a_text_or_a_list_the_deepest_problem_is_named(request_of, given, parameter):
    with pytest.raises(ApiError) as refused:
        read_request(request_of, json.dumps({"model": "m"} | given).encode())
    assert refused.value.parameter == parameter


def test_as_many_pairs_of_metadata_as_are_kept_are_taken():
    pairs = {f"x{place}": "x" for place in range(METADATA.most)}
    assert few_pairs(pairs) == pairs
    with pytest.raises(ValueError, match=f"it has {METADATA.most + 1} pairs"):
        few_pairs(pairs | {"more": "x"})


@pytest.mark.parametrize(
    "body",
    ['{"a": [1, 2, "x,[{"]}', '["a,b", {}, {"c": "\\"[,"}, []]', "[[], [[]], 1, 2]", '{"a": ",", "b": {"c": [3]}, "d": "]"}'],
)
def test_as_many_values_as_are_read_are_taken_whatever_texts_hold(body, monkeypatch):
    bare = re.sub(r'"(\\.|[^"\\])*"', "", body)
    containers = bare.count("[") + bare.count("{")
    values = containers + bare.count(",")
    for fewer_values, fewer_containers in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(bodies, "VALUES", bodies.VALUES._replace(most=values - fewer_values))
        monkeypatch.setattr(bodies, "CONTAINERS", bodies.CONTAINERS._replace(most=containers - fewer_containers))
        if not fewer_values + fewer_containers:
            assert bodies.read_json(body.encode()) == json.loads(body)
            continue
        named = f"{values - 1} values" if fewer_values else f"{containers - 1} lists and objects"
        with pytest.raises(ApiError, match=f"more than {named}, the most"):
            bodies.read_json(body.encode())


def test_as_many_names_as_are_read_are_looked_at():
    names = {"model": "m", "prompt": "a"} | {f"x{place}": 1 for place in range(FIELDS.most - 2)}
    for more, code in ({}, "unknown_parameter"), ({"y": 1}, "invalid_value"):
        with pytest.raises(ApiError) as refused:
            read_request(CompletionRequest, json.dumps(names | more).encode())
        assert refused.value.code == code and (code == "unknown_parameter" or "1,001 names" in str(refused.value))


def test_a_body_is_parsed_at_once_up_to_its_size(monkeypatch):
    class Asked:
        def __init__(self, size):
            self.size = size

        async def body(self):
            return b'{"model": "m", "prompt": "a"}'.ljust(self.size)

    places = []
    monkeypatch.setattr(bodies, "read_request", lambda kind, body: places.append(threading.current_thread()))
    for size in (PARSED_AT_ONCE, PARSED_AT_ONCE + 1):
        asyncio.run(bodies.read_body(CompletionRequest, Asked(size)))
    assert [place is threading.main_thread() for place in places] == [True, False]


def test_half_a_character_is_refused_and_both_halves_are_one():
    assert bodies.read_json(rb'"\ud83d\ude00"') == "\U0001f600"
    with pytest.raises(ApiError, match=r"has \\ude00 alone, half of a character"):
        bodies.read_json(rb'["a", "\ude00"]')
    for body, said in ((b"[1", "is not JSON"), (b"\xff", "is not JSON"), (b"[" * 40_000, "nested too deep")):
        with pytest.raises(ApiError, match=said):
            bodies.read_json(body)
    with pytest.raises(ApiError, match="must be a JSON object"):
        read_request(CompletionRequest, b"[]")


def test_a_body_cannot_be_changed_and_an_error_says_what_it_is():
    with pytest.raises(ValidationError, match="frozen"):
        complete().prompt = ["b"]
    error = bodies.overloaded("busy", headers={"X": "y"})
    assert (error.status, error.headers) == (503, {"Retry-After": "1", "X": "y"})
    assert error.body() == {"error": {"message": "busy", "type": "server_error", "param": None, "code": "server_overloaded"}}
    assert bodies.withdrawn("rude").status == 500


def test_a_text_names_no_folder_of_this_machine():
    assert bodies.without_places("no /usr/nowhere/x/y.py here") == "no y.py here"
    for kept in ("no /v1/chat/completions here", "see http://a.b/usr/lib", "one /usr alone"):
        assert bodies.without_places(kept) == kept


@pytest.mark.parametrize(
    ("given", "message", "parameter"),
    [
        ({"prompt": 5}, "invalid 'prompt'", "prompt"),
        ({"prompt": "a", "functions": [1]}, "'functions' is not supported by this server (only [])", "functions"),
        ({"prompt": "a", "x" * 2000: 5}, "unrecognized request argument: 'xxx", "x" * 1000),
        ({"prompt": "a", "stop": [1]}, "invalid 'stop[0]'", "stop[0]"),
    ],
)
def test_an_error_names_the_parameter_and_is_short(given, message, parameter):
    with pytest.raises(ApiError) as refused:
        read_request(CompletionRequest, json.dumps({"model": "m"} | given).encode())
    assert refused.value.parameter == parameter and str(refused.value).startswith(message)
    assert len(str(refused.value)) <= 1000


def test_a_completion_of_no_token_is_asked_for_with_its_echo():
    assert complete(max_tokens=0, echo=True).token_limit == 0
    for refused in ({}, {"echo": True, "best_of": 2}):
        with pytest.raises(ApiError, match="max_tokens: 0"):
            complete(max_tokens=0, **refused)


def test_plain_completion_is_16_tokens_unless_told():
    assert complete().token_limit == 16
