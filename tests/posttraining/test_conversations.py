import json

import pytest

from bessemer.core.errors import SourceError
from bessemer.posttraining.conversations import Conversation, read_conversations, write_conversations

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "Expecting property name"),
        ("[]", "'messages'"),
        ('{"messages": []}', "'messages'"),
        ('{"messages": ["a"]}', "message 1 must be"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 must be"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "role 'human'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
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
