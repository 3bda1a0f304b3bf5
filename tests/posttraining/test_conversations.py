import json

import pytest

from bessemer.core.errors import ArtefactError, BessemerError, SourceError
from bessemer.core.hashing import hash_value
from bessemer.posttraining.data.examples import Conversation, read_conversations, write_conversations

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "Expecting property name"),
        ("[]", "must be an object"),
        ('{"messages": []}', "messages: must be a list of at least one message"),
        ('{"messages": [["a"]]}', "message 1: must be an object"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1: the content must be text"),
        ('{"messages": [{"role": "moderator", "content": "a"}]}', "message 1: the role must be .* got 'moderator'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 1: the text has a lone surrogate"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"nom": "f"}]}]}', "message 1: tool_calls must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": [{}]}', "tool 0: must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "["}', "Expecting value"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"text": "a"}', "is in no known format: it has 'text'.*continued pretraining: bessemer recipes show continue"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(BessemerError, match=f"chat.jsonl:3: .*{problem}") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


def test_of_many_bad_rows_the_first_is_explained_and_the_others_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt;answer\nHello?;Hello.\n" + "Hello?;\n" * 7, encoding="utf-8")
    with pytest.raises(SourceError) as error:
        read_conversations(path, ("prompt", "answer"))
    assert str(error.value) == (
        f"{path}:3: needs a text under 'answer', which is empty (and 6 more: lines 4, 5, 6, 7, 8, …); 7 of 8 rows cannot be "
        "used, more than a twentieth; mend them, or take them out"
    )


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no such file"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ArtefactError, match="holds no rows"):
        read_conversations(tmp_path / "empty.jsonl")


def test_what_is_written_is_read_back(tmp_path):
    messages = ({"role": "user", "content": "ä\u2028\nb"}, {"role": "assistant", "content": "<|im_end|>"})
    write_conversations(tmp_path / "c.jsonl", [Conversation.of(messages, "here")])
    assert [conversation.messages for conversation in read_conversations(tmp_path / "c.jsonl")] == [messages]


def test_calls_of_tools_and_the_tools_are_read_and_written_back(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
    )
    tools = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)
    write_conversations(tmp_path / "c.jsonl", [Conversation.of(messages, "here", tools)])
    [read] = read_conversations(tmp_path / "c.jsonl")
    assert (read.messages, read.tools) == (messages, tools)
    assert read.id != Conversation.of(messages, "here").id


def test_a_conversation_without_tools_keeps_the_id_that_splits_it():
    assert Conversation.of(GOOD["messages"], "here").id == hash_value(GOOD["messages"])


CSV = "prompt,completion,label\nHello?,Hello.,greeting\n"
ROWS = {
    "share.jsonl": '{"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]}\n',
    "alpaca.json": '[{"instruction": "Hello?", "input": "", "output": "Hello."}]',
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "Hello?"}], "completion": "Hello."}\n',
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_other_formats_are_conversations(tmp_path, name):
    (tmp_path / name).write_text(ROWS[name], encoding="utf-8")
    [read] = read_conversations(tmp_path / name)
    assert [(one["role"], one["content"]) for one in read.messages] == [("user", "Hello?"), ("assistant", "Hello.")]
    write_conversations(tmp_path / "again.jsonl", [read])
    [again] = read_conversations(tmp_path / "again.jsonl")
    assert (again.answered, again.id) == (read.answered, read.id)


def test_a_table_is_texts_without_roles_or_a_conversation_by_the_names_of_its_columns(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(CSV, encoding="utf-8")
    [texts] = read_conversations(path)
    assert (texts.answered.prompt, texts.answered.answer, texts.messages) == ("Hello?", "Hello.", ())
    [named] = read_conversations(path, ("prompt", "label"))
    assert [one["content"] for one in named.messages] == ["Hello?", "greeting"]
    write_conversations(tmp_path / "again.jsonl", [texts, named])
    assert [one.answered for one in read_conversations(tmp_path / "again.jsonl")] == [texts.answered, named.answered]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("a,b\nx,y\n", r"t.csv:2: has no column 'prompt'; known: a, b"),
        ("prompt,anwser\nx,y\n", r"t.csv:2: has no column 'answer'; did you mean 'anwser'"),
        (
            "prompt,answer\nHello?,Hello.\nHello?,\n",
            r"t.csv:3: needs a text under 'answer', which is empty; 1 of 2 rows .* mend it",
        ),
        ("prompt,answer\nHello?,  \n", r"t.csv:2: needs a text under 'answer', which holds '  '"),
    ],
)
def test_a_table_that_cannot_be_learnt_from_is_told_in_one_line(tmp_path, table, problem):
    path = tmp_path / "t.csv"
    path.write_text(table, encoding="utf-8")
    with pytest.raises(BessemerError, match=problem) as error:
        read_conversations(path, ("prompt", "answer"))
    assert "\n" not in str(error.value)
