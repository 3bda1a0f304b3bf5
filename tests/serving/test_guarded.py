"""A server with a policy: what is asked and answered is checked in every dialect, and refusals say so."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from bessemer.safety.config import GuardConfig
from bessemer.safety.guard import Guard
from bessemer.safety.hook import GuardHook
from tests.safety.policies import policy
from tests.serving.engine import ScriptedEngine
from tests.serving.running import servers

SURFACES = {"prompt": {"categories": {"slag": "refuse"}}, "answer": {"categories": {"slag": "refuse"}}}
REFUSAL = "Nothing about slag."
#: Path, what it takes beside the question, and where its answer says that it was refused.
DIALECTS = {
    "/v1/chat/completions": ({}, '"finish_reason": ?"content_filter"'),
    "/v1/messages": ({}, '"stop_reason": ?"refusal"'),
    "/v1/responses": ({"max_tokens": None}, '"reason": ?"content_filter"'),
    "/api/chat": ({"max_tokens": None}, '"done_reason": ?"stop"'),
}


@pytest.fixture(scope="module")
def asked(tagged_tokenizer):
    """Asks one guarded server, whose model says the given texts one after the other."""
    engine = ScriptedEngine(tagged_tokenizer)
    engine.sampling_settings = {}  # as Ollama's routes ask
    guard = GuardHook(Guard(policy(surfaces=SURFACES), GuardConfig(rails=["rules", "words"])))
    with servers() as start:
        url = start(engine, hooks=[guard])

        def ask(path, question, *texts, stream=False, **more):
            engine.texts[:], engine.prompts[:] = texts, []
            messages = [{"role": "user", "content": question}]
            said = {"input": messages} if path == "/v1/responses" else {"messages": messages}
            body = {"model": "tiny", "max_tokens": 200, "stream": stream} | said | DIALECTS[path][0] | more
            sent = {name: value for name, value in body.items() if value is not None}
            return httpx.post(f"{url}{path}", json=sent, timeout=30), engine

        yield ask


def said(answer) -> str:
    """The text of a whole answer, or of the deltas of a stream."""
    found = re.findall(r'"(?:content|text|delta)": ?"((?:[^"\\]|\\.)*)"', answer.text)
    return json.loads('"' + "".join(found) + '"')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
def test_a_refused_question_is_answered_without_the_model(asked, path, stream):
    answer, engine = asked(path, "What is slag?", "never", stream=stream)
    assert answer.status_code == 200 and engine.prompts == [] and engine.texts == ["never"]
    assert REFUSAL in said(answer) and re.search(DIALECTS[path][1], answer.text), answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
def test_a_refused_sentence_is_not_sent_and_the_answer_says_why_it_ends(asked, path, stream):
    answer, _ = asked(path, "What is iron?", "A metal. It leaves slag. Then", stream=stream)
    assert answer.status_code == 200 and "leaves" not in answer.text and "Nothing about slag." in said(answer), answer.text
    assert re.search(DIALECTS[path][1], answer.text)
    if stream:
        assert said(answer).startswith("A metal.")


def test_several_answers_are_refused_together(asked):
    answer, _ = asked("/v1/chat/completions", "What is slag?", n=2)
    choices = answer.json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == [REFUSAL] * 2
    assert answer.json()["usage"]["completion_tokens"] == 0


def test_a_harmless_question_is_answered_as_without_a_guard(asked):
    answer, _ = asked("/v1/chat/completions", "What is iron?", "A metal.")
    assert answer.json()["choices"][0]["message"]["content"] == "A metal."
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
