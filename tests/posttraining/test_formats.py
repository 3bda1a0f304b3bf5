import json
import math
from pathlib import Path

import pytest

from bessemer.core.errors import RequestError
from bessemer.core.records import json_lines
from bessemer.posttraining.data.formats import (
    Answered,
    answer_in_columns,
    as_answered,
    as_labelled,
    as_labelled_answers,
    as_pair,
)

PREFERENCES = Path(__file__).parents[2].parent / "shared" / "data" / "preference"


def answer_in_columns_named(row):
    return answer_in_columns(row, ("q", "a"))


def said(role, content):
    return {"role": role, "content": content}


ASKED, WELL, BADLY = said("user", "What is 2 + 2?"), said("assistant", "4"), said("assistant", "5")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "completion": [WELL]},
        {"prompt": [ASKED], "completion": "4"},
        {"prompt": "What is 2 + 2?", "completion": [WELL]},
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
    ],
)
def test_a_prompt_and_its_answer_are_told_apart(row):
    assert as_answered(row) == Answered((ASKED,), (WELL,))


def test_conversations_of_other_formats_become_messages():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "What is 2 + 2?"},
        {"from": "gpt", "value": "4"},
    ]
    expected = Answered((), (said("system", "Be brief."), ASKED, WELL))
    assert as_answered({"conversations": turns}) == expected
    assert as_answered({"messages": list(expected.answer)}) == expected
    alpaca = as_answered({"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "Be brief."})
    assert alpaca.prompt == (said("system", "Be brief."), said("user", "Add.\n\n2 + 2"))


BRIEF = said("system", "Be brief.")


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "messages": [ASKED, WELL]},
        {"system": "Be verbose.", "messages": [BRIEF, ASKED, WELL]},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_a_rows_system_message_stands_before_what_has_none(row):
    assert as_answered(row) == Answered((), (BRIEF, ASKED, WELL))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Double.", "input": 4, "output": 8}, [said("user", "Double.\n\n4")]),
        ({"instruction": "Who?", "context": "Ann did it.", "response": "8"}, [said("user", "Who?\n\nAnn did it.")]),
        (
            {"instruction": "More.", "history": [["2 + 2", "4"]], "output": "8"},
            [said("user", "2 + 2"), said("assistant", "4"), said("user", "More.")],
        ),
        ({"system": "Be brief.", "prompt": "4 + 4", "completion": "8"}, [BRIEF, said("user", "4 + 4")]),
    ],
)
def test_nothing_that_a_row_gives_to_know_is_left_out(row, prompt):
    assert as_answered(row) == Answered(tuple(prompt), (said("assistant", "8"),))


def test_a_call_of_sharegpt_is_a_call():
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2}}'}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
    assert as_answered({"conversations": turns}).answer[-1] == said("assistant", "") | {"tool_calls": [call]}


def test_cells_of_csv_are_texts_and_may_be_empty():
    row = {"prompt": "2 + 2", "completion": " = 4", "label": "True", "tools": ""}
    assert as_labelled(row).is_desirable and not as_labelled(row | {"label": "0"}).is_desirable
    pair = as_pair({"prompt": "2 + 2", "chosen": " = 4", "rejected": " = 5", "weight": "0.5", "margin": ""})
    assert (pair.weight, pair.margin) == (0.5, 0.0)
    with pytest.raises(ValueError, match="weight is of a pair"):
        as_labelled_answers({"prompt": "2 + 2", "chosen": " = 4", "rejected": " = 5", "weight": "0.5"})


def test_texts_stay_texts():
    assert as_answered({"prompt": "The sky is", "completion": " blue."}) == Answered("The sky is", " blue.")
    pair = as_pair({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")
    assert as_pair({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == pair


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [WELL], "rejected": [BADLY]},
        {"prompt": [ASKED], "chosen": "4", "rejected": "5"},
        {"chosen": [ASKED, WELL], "rejected": [ASKED, BADLY]},
        {"chosen": "\n\nHuman: What is 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: What is 2 + 2?\n\nAssistant: 5"},
        {"instruction": "What is 2 + 2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"},
        {"prompt": "What is 2 + 2?", "chosen": [ASKED, WELL], "rejected": [ASKED, BADLY]},
        {"question": [ASKED], "chosen": "4", "rejected": "5"},
        {"messages": [ASKED], "chosen": "4", "rejected": "5"},
        {
            "conversations": [{"from": "human", "value": ASKED["content"]}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
)
def test_a_pair_has_the_prompt_that_both_answer(row):
    pair = as_pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASKED,), (WELL,), (BADLY,))


def test_pairs_part_at_the_turn_in_which_they_differ():
    longer = [ASKED, WELL, said("user", "Sure?"), said("assistant", "Yes.")]
    pair = as_pair({"chosen": longer, "rejected": [ASKED, WELL, said("user", "Sure?"), said("assistant", "No.")]})
    assert len(pair.prompt) == 3
    # where the users' words differ, the answers part before them
    pair = as_pair({"chosen": longer, "rejected": [ASKED, WELL, said("user", "Really?"), said("assistant", "No.")]})
    assert pair.prompt == (ASKED,) and len(pair.chosen) == 3


@pytest.mark.parametrize(
    ("parse", "row", "words"),
    [
        (as_answered, {"question": "?", "answer": "!"}, "is in no known format: it has 'question', 'answer'"),
        (as_answered, {"messages": [ASKED]}, "the assistant says nothing in it"),
        (as_answered, {"messages": []}, "at least one message"),
        (
            as_answered,
            {"messages": [ASKED, said("system", "Late."), WELL]},
            "message 2: a system message stands at the beginning",
        ),
        (as_answered, {"messages": [said("tool", "4"), WELL]}, "message 1: a tool answers the assistant"),
        (as_answered, {"messages": [said("robot", "4")]}, "the role must be one of"),
        (as_answered, {"conversations": [{"from": "moderator", "value": "4"}]}, "turn 1: 'from' must be one of"),
        (as_answered, {"instruction": "Add.", "output": " "}, "needs a text under 'output'"),
        (as_answered, {"prompt": [ASKED], "completion": ""}, "completion: the answer is empty"),
        (as_answered, {"prompt": [ASKED], "completion": [ASKED, WELL]}, "must begin with the assistant"),
        (as_pair, {"prompt": [ASKED], "chosen": "4"}, "needs the keys 'chosen' and 'rejected'"),
        (as_pair, {"prompt": [ASKED], "chosen": "4", "rejected": "4"}, "are the same"),
        (as_pair, {"chosen": [WELL], "rejected": [BADLY]}, "begin with no message alike"),
        (as_pair, {"prompt": [ASKED], "chosen": "4", "rejected": "5", "margin": "much"}, "margin must be a number"),
        (as_labelled, {"prompt": [ASKED], "completion": "4", "label": 2}, "label must be true or false"),
        (as_answered, {"messages": [ASKED, said("assistant", "  ")]}, "the assistant says nothing in it"),
        (as_answered, {"messages": [ASKED, WELL], "tools": "[{"}, "tools must be a list in JSON"),
        (as_answered, {"conversations": [{"from": "function_call", "value": "add 2"}]}, "must be a call in JSON"),
        (as_answered, {"instruction": "Add.", "input": [2], "output": "4"}, "needs a text under 'input'"),
        (as_answered, {"instruction": "Add.", "history": ["2"], "output": "4"}, "history must be a list of a question and"),
        (as_pair, {"input": "2 + 2?", "chosen": "It is four.", "rejected": "It is five."}, "there is 'input'; give the prompt"),
        (as_pair, {"chosen": "4", "rejected": "5"}, "they begin with nothing alike"),
        (answer_in_columns_named, {"q": "2 + 2?", "a": math.nan}, "needs a text under 'a'"),
    ],
)
def test_a_malformed_row_is_told_in_one_line(parse, row, words):
    with pytest.raises((ValueError, RequestError), match=r"^[^\n]*$") as found:
        parse(row)
    assert words in str(found.value)


@pytest.mark.skipif(not PREFERENCES.is_dir(), reason="the data that the project is tried on is not here")
def test_public_preference_data_is_read_as_it_is():
    polite = json.loads((PREFERENCES / "instructions_polite_1100.json").read_text(encoding="utf-8"))
    same = [row for row in polite if row["chosen"] == row["rejected"]]
    pairs = [as_pair(row) for row in polite if row not in same]
    assert len(pairs) + len(same) == 1100 and len(same) < 20
    harmless = json_lines((PREFERENCES / "hh_harmless_1800.jsonl").read_text(encoding="utf-8"))
    parsed, refused = [], []
    for row in harmless:
        try:
            parsed.append(as_pair(row))
        except (ValueError, RequestError) as error:
            refused.append(str(error))
    assert len(parsed) > 0.97 * len(harmless), refused[:5]
    assert all(pair.prompt[-1]["role"] == "user" for pair in parsed)


def test_a_null_content_is_empty_or_beside_calls_absent():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    silent = {"role": "assistant", "content": None}
    rows = [said("user", "Hi"), silent | {"tool_calls": [call]}, {"role": "tool", "content": None}, said("assistant", "Done.")]
    answer = as_answered({"messages": rows}).answer
    assert answer[1:3] == ({"role": "assistant", "tool_calls": [call]}, said("tool", ""))
    with pytest.raises(ValueError, match="the assistant says nothing in it"):
        as_answered({"messages": [said("user", "Hi"), silent]})
