"""What a row asks a teacher or a student: nothing in its columns is lost on the way."""

import json

import pytest

from bessemer.posttraining.distillation.answers import prompt_of
from tests.posttraining.test_formats import said

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
QUESTION = said("user", "Why?")


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [QUESTION]},
        {"prompt": [QUESTION], "completion": [said("assistant", "So.")]},
        {"messages": [QUESTION, said("assistant", "So.")]},
        {"prompt": "Why?", "system": ""},
    ],
    ids=["prompt", "completion", "messages", "a text"],
)
def test_tools_are_kept_or_refused(row, tools):
    if isinstance(row.get("prompt"), str):
        with pytest.raises(ValueError, match="tools are shown in a conversation, and the prompt is a text"):
            prompt_of(row | {"tools": tools})
        assert prompt_of(row | {"tools": "[]"}).turns == "Why?"
    else:
        assert prompt_of(row | {"tools": tools}).tools == tuple(TOOLS)


@pytest.mark.parametrize("prompt", ["Why?", [QUESTION]], ids=["text", "messages"])
@pytest.mark.parametrize("answer", [{}, {"completion": "So."}], ids=["alone", "with a completion"])
def test_a_system_column_is_the_system_message(prompt, answer):
    found = prompt_of({"prompt": prompt, "system": "Be brief.", **answer})
    assert found.turns == (said("system", "Be brief."), QUESTION)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([said("tool", "12 degrees")], "message 1: a tool answers the assistant, and here it answers nobody"),
        ([said("user", " ")], "its last message is empty, so that nothing is asked"),
        ([QUESTION, said("assistant", "So."), said("user", "")], "its last message is empty"),
        ([QUESTION, said("assistant", "So.")], "it ends with the assistant"),
        ([QUESTION, said("system", "Be brief."), QUESTION], "a system message stands at the beginning"),
        (" ", "needs a text under 'prompt'"),
        ({"role": "user"}, "needs messages or a text under 'prompt'"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        prompt_of({"prompt": prompt})


def test_a_tool_may_return_nothing():
    call = {**said("assistant", ""), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert len(prompt_of({"prompt": [QUESTION, call, said("tool", "")]}).turns) == 3
