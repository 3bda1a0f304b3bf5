"""Text that is withheld until a check has passed, taken back, tried again and refused: in every dialect, streamed and whole."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from bessemer.assistant.hooks import Deny, Hook, Pass, Refuse, Retry, Wait
from bessemer.assistant.messages import ToolCall
from tests.serving.engine import ScriptedEngine
from tests.serving.running import servers

SAID = [{"role": "user", "content": "Go on"}]


class SentenceGuard(Hook):
    """Lets whole sentences pass; sends a text with `wrong` back, and refuses one with `worse`.

    Neither word is made of hexadecimal digits, which would stand in the id of an answer now and then.
    """

    holds_back = True

    def __init__(self):
        self.attempts = []

    def check(self, draft, context, *, is_final):
        self.attempts.append(context.attempt)
        if "worse" in draft.text:
            return Refuse("worse", "I will not say that.")
        if "wrong" in draft.text:
            return Retry("wrong", "Say nothing wrong.")
        return Pass() if is_final or draft.text.endswith(".") else Wait()


@pytest.fixture
def asked(tagged_tokenizer):
    """Asks a server whose model says the given texts one after the other."""
    with servers() as start:

        def ask(texts, path="/v1/chat/completions", hook=None, **body):
            engine = ScriptedEngine(tagged_tokenizer, *texts)
            url = start(engine, hooks=[hook or SentenceGuard()])
            given = {"model": "tiny", "messages": SAID, "max_tokens": 200} | body
            return httpx.post(f"{url}{path}", json=given, timeout=30), engine

        yield ask


def parts(answer):
    """The events of a stream of chat completions."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    return [json.loads(line) for line in lines]


def test_nothing_of_a_sentence_is_sent_before_it_has_passed(asked):
    answer, _ = asked(["One. Two more."], stream=True, return_token_ids=True)
    texts = [part["choices"][0]["delta"].get("content") for part in parts(answer)]
    assert [text for text in texts if text] == ["One.", " Two more."] or "".join(filter(None, texts)) == "One. Two more."
    assert all(text.endswith(".") for text in texts if text)


def test_what_is_sent_back_is_never_seen_in_text_ids_or_log_probabilities(asked, tagged_tokenizer):
    for stream in (False, True):
        answer, engine = asked(["Quite wrong.", "Quite good."], stream=stream, return_token_ids=True, logprobs=True)
        assert answer.status_code == 200 and "wrong" not in answer.text
        told = parts(answer) if stream else [answer.json()]
        choices = [part["choices"][0] for part in told if part["choices"]]
        ids = [id for choice in choices for id in choice.get("token_ids") or ()]
        said = (choice.get("delta") or choice.get("message") or {} for choice in choices)
        text = "".join(one.get("content") or "" for one in said)
        assert text == "Quite good."
        assert tagged_tokenizer.decode(ids) == "Quite good."
        assert "Say nothing wrong." in engine.prompts[1] and engine.texts == []


def test_a_refusal_is_the_answer_and_says_so(asked):
    for stream in (False, True):
        answer, _ = asked(["Much worse."], stream=stream)
        assert "Much" not in answer.text and "I will not say that." in answer.text.replace('"}', "")
        last = parts(answer)[-1] if stream else answer.json()
        assert last["choices"][0]["finish_reason"] == "content_filter"


def test_tries_come_to_an_end(asked):
    hook = SentenceGuard()
    answer, engine = asked(["wrong."] * 9, hook=hook)
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
    assert max(hook.attempts) < 9 and engine.texts


def test_an_event_is_one_line_for_clients_that_break_lines_at_other_characters_too(asked):
    text = "One\u2028two\u2029three\x85four."
    for path, body in (("/v1/chat/completions", {}), ("/v1/messages", {})):
        answer, _ = asked([text], path, stream=True, **body)
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        told = "".join(re.findall(r'"(?:text|content)": ?"((?:[^"\\]|\\.)+)"', "".join(lines)))
        assert json.loads(f'"{told}"') == text, answer.text


def test_other_dialects_hold_back_too(asked):
    for path, body in (("/v1/messages", {}), ("/v1/responses", {"messages": None, "max_tokens": None, "input": "Go on"})):
        for stream in (False, True):
            given = body | {"stream": stream}
            answer, _ = asked(["Quite wrong.", "Quite good."], path, **given)
            said = "".join(re.findall(r'"(?:text|delta)": ?"([^"]+)"', answer.text))
            assert answer.status_code == 200 and "wrong" not in said and "Quite good." in said, answer.text


def test_texts_that_pass_no_check_are_not_answered(asked):
    answer, _ = asked(["wrong."], "/v1/completions", messages=None, prompt="Go on")
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "not_allowed"


class Chaperone(Hook):
    """Denies calls in Linz, and has all others made in Graz."""

    def before_call(self, call, tool, context):
        if call.arguments["city"] == "Linz":
            return Deny("not there")
        return ToolCall(call.id, call.name, {"city": "Graz"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_client_is_sent_the_calls_that_a_hook_allows_as_it_changed_them(asked, path, stream):
    calls = [f'<tool_call>{{"name": "visit", "arguments": {{"city": "{city}"}}}}</tool_call>' for city in ("Linz", "Wien")]
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "visit", "description": "", "parameters": schema}
    tools = {
        "/v1/chat/completions": {"tools": [{"type": "function", "function": function}]},
        "/v1/responses": {"tools": [{"type": "function", **function}], "input": SAID, "messages": None, "max_tokens": None},
        "/v1/messages": {"tools": [{"name": "visit", "description": "", "input_schema": schema}]},
    }[path]
    given, _ = asked(["".join(calls)], path, hook=Chaperone(), stream=stream, **tools)
    assert given.status_code == 200 and "Graz" in given.text, given.text
    assert "Linz" not in given.text and "Wien" not in given.text
    alone, engine = asked([calls[0], "not asked"], path, hook=Chaperone(), stream=stream, **tools)
    assert alone.status_code == 200 and "Linz" not in alone.text and engine.texts, "a turn of the server has one round"
    if path == "/v1/chat/completions":
        last = parts(alone)[-1] if stream else alone.json()
        assert last["choices"][0]["finish_reason"] == "stop"


class Judge(Hook):
    """Looks at whole messages alone, and holds nothing back."""

    def check(self, draft, context, *, is_final):
        return Retry("wrong") if "wrong" in draft.text else Pass()


def test_a_message_that_is_sent_back_whole_leaves_no_ids_either(asked, tagged_tokenizer):
    answer, _ = asked(["Quite wrong.", "Quite good."], hook=Judge(), return_token_ids=True, logprobs=True)
    assert "wrong" not in answer.text
    assert tagged_tokenizer.decode(answer.json()["choices"][0]["token_ids"]) == "Quite good."
