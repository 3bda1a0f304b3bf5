import json

import pytest

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.posttraining.conversations import Conversation, read_conversations, write_conversations

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "Expecting property name"),
        ("[]", "'messages'"),
        ('{"messages": []}', "'messages'"),
        ('{"messages": ["a"]}', "message 1: must be an object"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1: the content must be text"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "message 1: the role must be .* got 'human'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 1: the text has a lone surrogate"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}', "message 1: tool_calls must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": [{}]}', "tool 0: must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "["}', "Expecting value"),
        ("[" * 100_000, ""),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(SourceError, match=f"chat.jsonl:3: .*{problem}") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_utf8_are_named_by_their_line(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(SourceError, match=r"chat\.jsonl:1: "):
        read_conversations(path)


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SourceError, match="holds no conversation"):
        read_conversations(tmp_path / "empty.jsonl")


def test_what_is_written_is_read_back(tmp_path):
    messages = ({"role": "user", "content": "ä\u2028\nb"}, {"role": "assistant", "content": "<|im_end|>"})
    write_conversations(tmp_path / "c.jsonl", [Conversation(messages, "here")])
    assert [conversation.messages for conversation in read_conversations(tmp_path / "c.jsonl")] == [messages]


def test_calls_of_tools_and_the_tools_are_read_and_written_back(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
    )
    tools = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)
    write_conversations(tmp_path / "c.jsonl", [Conversation(messages, "here", tools)])
    [read] = read_conversations(tmp_path / "c.jsonl")
    assert (read.messages, read.tools) == (messages, tools)
    assert read.id != Conversation(messages, "here").id


def test_a_conversation_without_tools_keeps_the_id_that_splits_it():
    assert Conversation(tuple(GOOD["messages"]), "here").id == hash_value(GOOD["messages"])
