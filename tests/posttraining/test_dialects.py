"""Dialects of conversations: the speakers and keys of TRL, axolotl, LLaMA-Factory and unsloth, and hand-made warts."""

import pytest

from bessemer.core.errors import RequestError
from bessemer.posttraining.data.formats import as_answered, as_labelled, as_pair, tools_of
from tests.posttraining.test_formats import said

ASKED, ANSWERED = said("user", "What is 2 + 2?"), said("assistant", "4")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}

#: What the tables of peers call each role: `roles` of axolotl, the tags of LLaMA-Factory's converter, the aliases
#: of unsloth's `standardize_data_formats`, and the speakers in dumps of ShareGPT and of OpenAssistant.
SPEAKERS = {
    "user": ("human", "user", "input", "Human", " USER ", "prompter"),
    "assistant": ("gpt", "assistant", "output", "GPT", "chatgpt", "bard", "bing", "model", "bot"),
    "tool": ("tool", "observation", "function", "function_response", "ipython"),
    "system": ("system", "developer", "System"),
}


@pytest.mark.parametrize(("role", "speaker"), [(role, one) for role, names in SPEAKERS.items() for one in names])
def test_a_speaker_of_the_peers_is_the_role_that_it_is_to_them(role, speaker):
    turns = {
        "user": [{"from": speaker, "value": "a"}, {"from": "gpt", "value": "b"}],
        "assistant": [{"from": "human", "value": "a"}, {"from": speaker, "value": "b"}],
        "tool": [{"from": "gpt", "value": "b"}, {"from": speaker, "value": "c"}],
        "system": [{"from": speaker, "value": "a"}, {"from": "gpt", "value": "b"}],
    }[role]
    assert role in [one["role"] for one in as_answered({"conversations": turns}).answer]


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [{"role": "human", "content": "What is 2 + 2?"}, {"role": "gpt", "content": "4"}]},
        {"dialogue": [{"speaker": "user", "text": "What is 2 + 2?"}, {"speaker": "bot", "text": "4"}]},
        {"conversations": [{"human": "What is 2 + 2?", "assistant": "4"}]},
        {"conversation": ["What is 2 + 2?", "4"]},
        {"messages": '[{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]'},
        {"messages": "[{'role': 'user', 'content': 'What is 2 + 2?'}, {'role': 'assistant', 'content': '4'}]"},
        {"messages": {"role": ["user", "assistant"], "content": ["What is 2 + 2?", "4"]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["What is 2 + 2?", "4"], "weight": [None, None]}},
        {"messages": None, "conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {
            "messages": [
                said("user", [{"type": "text", "text": "What is "}, {"type": "input_text", "text": "2 + 2?"}]),
                ANSWERED,
            ]
        },
        {"messages": [ASKED, said("assistant", None) | {"refusal": "4"}]},
        {
            "messages": [said("user", [{"type": "text", "value": "What is 2 + 2?"}]) | {"loss_weight": 0.0}, ANSWERED],
            "images": [],
        },
    ],
)
def test_a_conversation_is_the_same_in_every_dialect(row):
    assert as_answered(row).answer == (ASKED, ANSWERED)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x": 2}'}},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"x": 2}}]},
        {"role": "assistant", "content": "", "tool_calls": '[{"function": {"name": "add", "arguments": {"x": 2}}}]'},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2}}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"x\\": 2}"}]'},
        said("assistant", [{"type": "tool_call", "value": '{"name": "add", "arguments": {"x": 2}}'}]),
        said("assistant", [{"type": "tool_use", "name": "add", "input": {"x": 2}}]),
    ],
)
def test_a_call_of_a_tool_is_the_same_in_every_dialect(turn):
    assert as_answered({"messages": [ASKED, turn]}).answer[-1]["tool_calls"] == [CALL]


def test_arguments_that_are_no_json_are_learnt_as_they_are():
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "x=2"}}]}
    (call,) = as_answered({"messages": [ASKED, turn]}).answer[-1]["tool_calls"]
    assert call["function"]["arguments"] == "x=2"


FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [{"type": "function", "function": FUNCTION}]},
        {"tools": [FUNCTION]},
        {"functions": [FUNCTION]},
        {"tools": [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]},
        {"tools": '[{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}]'},
    ],
)
def test_tools_are_the_same_in_every_dialect(row):
    assert tools_of(row) == ({"type": "function", "function": FUNCTION},)


def test_a_developer_and_a_system_message_are_one():
    first = [said("system", "You are Ada."), said("developer", "Be brief.")]
    assert as_answered({"messages": [*first, ASKED, ANSWERED]}).answer[0] == said("system", "You are Ada.\n\nBe brief.")
    row = {"system_prompt": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert as_answered(row).answer[0] == said("system", "Be brief.")


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
def test_a_turn_that_is_not_learnt_is_marked_in_every_dialect(key):
    turns = [ASKED, said("assistant", "Hm.") | key, ASKED, ANSWERED | {"train": True}]
    assert [one.get("weight") for one in as_answered({"messages": turns}).answer] == [None, 0, None, 1]


@pytest.mark.parametrize(
    "turn",
    [
        *(ANSWERED | {key: "Two and two."} for key in ("thinking", "reasoning", "reasoning_content")),
        said("assistant", [{"type": "reasoning", "value": "Two and two."}, {"type": "text", "value": "4"}]),
        said("assistant", [{"type": "thinking", "thinking": "Two and two."}, {"type": "text", "text": "4"}]),
    ],
)
def test_a_thought_is_a_thought_in_every_dialect(turn):
    assert as_answered({"messages": [ASKED, turn]}).answer[-1] == ANSWERED | {"reasoning_content": "Two and two."}


def test_pairs_and_labels_of_others_are_pairs_and_labels():
    pair = as_pair({
        "input": {"messages": [ASKED], "tools": [FUNCTION], "parallel_tool_calls": True},
        "preferred_output": [ANSWERED],
        "non_preferred_output": [said("assistant", "5")],
    })  # fmt: skip
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASKED,), (ANSWERED,), (said("assistant", "5"),))
    assert len(pair.tools) == 1
    turns = [{"from": "human", "value": "What is 2 + 2?"}]
    llama_factory = {"conversations": turns, "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    assert as_pair(llama_factory) == as_pair({"prompt": [ASKED], "chosen": "4", "rejected": "5"})
    whole = {"chosen_messages": [ASKED, ANSWERED], "rejected_messages": [ASKED, said("assistant", "5")]}
    assert as_pair(whole) == as_pair(llama_factory)
    judged = {"messages": [*turns, {"from": "gpt", "value": "4"}], "kto_tag": True}
    assert as_labelled(judged) == as_labelled({"prompt": [ASKED], "completion": "4", "label": "good"})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversations": []}, "conversations: must be a list of at least one message"),
        ({"turns": ["Who?", "And why?"]}, "a list of texts does not say who speaks"),
        ({"messages": [ASKED, ANSWERED], "videos": ["a.mp4"]}, "has videos, which are not learnt yet"),
        ({"messages": "[{"}, "messages: its text is no list in JSON"),
        ({"messages": [said("user", [{"type": "input_audio", "input_audio": {}}]), ANSWERED]}, "kind 'input_audio'"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no 'from' and 'value'"),
        ({"conversations": [{"a": 1}]}, "turn 1 has no 'role' and 'content', and no 'from' and 'value'"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "weight must be 0 or 1"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool_calls must be a list of"),
    ],
)
def test_what_is_in_no_dialect_is_told_in_one_line(row, why):
    with pytest.raises((ValueError, RequestError), match=r"^[^\n]*$") as error:
        as_answered(row)
    assert why in str(error.value)
