"""How tasks of each kind ask, and what they make of answers."""

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import ContinuationRequest
from tests.tasks.written import ANIMALS, FakeScore, task_of, write_task

WINOGRAD = [{"context_options": ["The cat chased the dog because the cat", "The cat chased the dog because the dog"],
             "continuation": "was angry.", "gold": 0}] * 2  # fmt: skip
SUMS = [{"context": f"{number}+1=", "continuation": str(number + 1)} for number in range(4)]
RIDDLES = [
    {"context": f"Q: {word}?", "answer": word.upper(), "aliases": [word, f"a {word}"]} for word in ("fire", "ice", "ash")
]


def likelihoods(*values):
    """Scores of a part's continuations, of one token each."""
    return [FakeScore([value], [index]) for index, value in enumerate(values)]


# -- choice


def test_choices_are_continuations_of_the_question(tmp_path):
    task = task_of(tmp_path, ANIMALS, kind="choice", joiner="\nAnswer: ", unconditional="Answer:")
    first, *_ = task.questions()
    assert first.parts == (
        ContinuationRequest("Which animal says miaow?\nAnswer: ", ("cat", "dog", "cow")),
        ContinuationRequest("Answer: ", ("cat", "dog", "cow")),
    )
    assert task.chance == pytest.approx(1 / 3)


def test_the_likeliest_choice_is_chosen_by_each_normalisation(tmp_path):
    rows = [{"query": "?", "choices": ["no", "certainly not"], "gold": 1}]
    task = task_of(tmp_path, rows, kind="choice", score="bytes")
    (question,) = task.questions()
    outcome = task.judge(question, [[FakeScore([-2.0], [1]), FakeScore([-1.5, -1.5], [2, 3])]])
    assert outcome.scores == {"raw": 0, "tokens": 1, "characters": 1, "bytes": 1, "distinct_tokens": 1}
    assert (outcome.chosen, outcome.gold, task.headline("cloze")) == (1, 1, "bytes")


def test_the_lettered_form_lists_the_choices_and_scores_letters(tmp_path):
    task = task_of(tmp_path, ANIMALS, kind="choice", form="best", shots=1)
    questions = task.questions()
    assert [question.form for question in questions] == ["cloze"] * 3 + ["letters"] * 3
    (part,) = questions[3].parts
    example, asked = part.context.split("\n\n")
    assert asked == "Which animal says miaow?\n A. cat\n B. dog\n C. cow\nAnswer: " and part.continuations == ("A", "B", "C")
    assert example in (
        "Which animal says woof?\n A. cat\n B. dog\n C. cow\nAnswer: B",
        "Which animal says moo?\n A. cat\n B. dog\n C. cow\nAnswer: C",
    )
    assert task.judge(questions[4], [likelihoods(-3, -1, -2)]).scores == {"raw": 1.0}
    assert task.headline("letters") == "raw"


def test_gold_may_be_a_letter_and_choices_fields_of_their_own(tmp_path):
    rows = [{"query": "?", "first": "a", "second": "b", "key": "B"}]
    task = task_of(tmp_path, rows, kind="choice", choices=["first", "second"], gold="key")
    (question,) = task.questions()
    assert question.parts[0].continuations == ("a", "b")
    assert task.judge(question, [likelihoods(-2, -1)]).scores["raw"] == 1


# -- schema, cloze


def test_a_schema_scores_one_continuation_behind_each_context(tmp_path):
    task = task_of(tmp_path, WINOGRAD, kind="schema")
    question = task.questions()[0]
    assert question.parts == tuple(
        ContinuationRequest(f"{context} ", ("was angry.",)) for context in WINOGRAD[0]["context_options"]
    )
    assert task.judge(question, [likelihoods(-2), likelihoods(-3)]).scores == {"accuracy": 1}
    assert task.judge(question, [likelihoods(-3), likelihoods(-2)]).scores == {"accuracy": 0}


def test_a_cloze_is_right_where_greedy_decoding_writes_it(tmp_path):
    task = task_of(tmp_path, SUMS, kind="cloze", joiner="")
    question = task.questions()[2]
    assert question.parts == (ContinuationRequest("2+1=", ("3",)),)
    assert task.judge(question, [[FakeScore([0.0], [7], is_greedy=True)]]).scores == {"accuracy": 1, "probability": 1}
    assert task.judge(question, [[FakeScore([0.0], [7])]]).scores["accuracy"] == 0


# -- generate


def test_a_generated_answer_may_be_any_of_its_aliases(tmp_path):
    task = task_of(tmp_path, RIDDLES, kind="generate", answers=["answer", "aliases"], joiner=" -> ", shots=1)
    question = task.questions()[1]
    # the model writes the space before its answer
    assert question.context.endswith("\n\nQ: ice? ->") and ("FIRE" in question.context or "ASH" in question.context)
    assert task.judge(question, ["An ice"]).scores == {"accuracy": 1}
    assert task.judge(question, ["steam"]).scores == {"accuracy": 0}
    assert task.judge(question, [""]).scores == {"accuracy": 0}


def test_samples_give_pass_at_k_and_the_majority(tmp_path):
    task = task_of(tmp_path, RIDDLES, TaskOptions(samples=4), kind="generate", answers=["aliases"])
    assert (task.generation.samples, task.generation.temperature) == (4, 0.8)
    scores = task.judge(task.questions()[0], ["ice", "fire", "Fire!", ""]).scores
    assert scores == {"accuracy": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1, "maj@4": 1}


def test_equal_samples_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="4 samples at temperature 0 are equal"):
        task_of(tmp_path, RIDDLES, kind="generate", samples=4, temperature=0)


# -- examples


def test_examples_are_the_same_for_all_items_and_never_the_item_itself(tmp_path):
    questions = task_of(
        tmp_path, SUMS, kind="cloze", joiner="", shots=2, description="Sums.", example_delimiter="\n"
    ).questions()
    lines = [question.parts[0].context.split("\n") for question in questions]
    for number, (head, *examples, asked) in enumerate(lines):
        assert head == "Sums." and asked == f"{number}+1=" and len(set(examples)) == 2
        assert not any(example.startswith(asked) for example in examples)
    # of three rows that were drawn the item leaves two
    assert len({line for _, *examples, _ in lines for line in examples}) == 3
    others = task_of(tmp_path, SUMS, TaskOptions(seed=5), kind="cloze", joiner="", shots=2, example_delimiter="\n").questions()
    assert [question.parts for question in others] != [question.parts for question in questions]


def test_examples_by_item_are_those_of_a_draw_from_the_other_items(tmp_path):
    import random

    task = task_of(
        tmp_path, SUMS, kind="cloze", joiner="", shots=2, example_choice="by_item", seed=1234, example_delimiter="\n"
    )
    for number, question in enumerate(task.questions()):
        drawn = random.Random(1234 + number).sample([other for other in range(4) if other != number], 2)
        assert question.parts[0].context.split("\n")[:-1] == [f"{other}+1={other + 1}" for other in drawn]


def test_examples_may_come_from_a_file_of_their_own(tmp_path):
    write_task(tmp_path, [{"context": "9+1=", "continuation": "10"}], name="shown", kind="cloze")
    task = task_of(tmp_path, SUMS, kind="cloze", joiner="", shots=1, examples="shown.jsonl")
    assert {question.parts[0].context.split("\n\n")[0] for question in task.questions()} == {"9+1=10"}


def test_a_chat_asks_each_example_as_a_turn(tmp_path):
    task = task_of(tmp_path, SUMS[:2], TaskOptions(chat=True, system="Be brief."), kind="cloze", joiner=" ", shots=1)
    assert task.questions()[0].parts[0].context == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "0+1="},
    )


def test_limit_takes_the_first_items(tmp_path):
    task = task_of(tmp_path, SUMS, TaskOptions(limit=2), kind="cloze", joiner="")
    assert [question.parts[0].context for question in task.questions()] == ["0+1=", "1+1="]


# -- what is wrong

BAD_ROWS = [
    ({"kind": "choice"}, {"query": "?", "choices": ["a", "b"]}, r"task.jsonl:2: has no field 'gold'; known: choices, query"),
    (
        {"kind": "choice"},
        {"query": "?", "choices": ["a", "b"], "gold": 2},
        r"task.jsonl:2: 'gold' is 2, and the right one of 2",
    ),
    ({"kind": "choice"}, {"query": "?", "choices": ["a", "b"], "gold": -1}, r"task.jsonl:2: 'gold' is -1"),
    ({"kind": "choice"}, {"query": "?", "choices": ["a", "b"], "gold": True}, r"task.jsonl:2: 'gold' is True"),
    ({"kind": "choice"}, {"query": "?", "choices": ["a"], "gold": 0}, r"task.jsonl:2: 'choices' holds 1 option"),
    ({"kind": "choice"}, {"query": "?", "choices": ["a", " "], "gold": 0}, r"task.jsonl:2: option 1 of 'choices' is empty"),
    ({"kind": "choice"}, {"query": ["?"], "choices": ["a", "b"], "gold": 0}, r"task.jsonl:2: the field 'query' must be text"),
    ({"kind": "generate", "prompt": "", "answers": ["gold"]}, {"gold": []}, r"task.jsonl:2: 'gold' holds no right answer"),
    (
        {"kind": "generate", "prompt": "", "answers": ["gold"], "verifier": "numeric"},
        {"gold": "many"},
        r"task.jsonl:2: the right answer 'many' is not a number",
    ),
]


@pytest.mark.parametrize(("settings", "row", "message"), BAD_ROWS)
def test_a_row_that_does_not_fit_is_named_with_file_and_line(tmp_path, settings, row, message):
    with pytest.raises(ArtefactError, match=message):
        task_of(tmp_path, [{"query": "?", "choices": ["a", "b"], "gold": 1}, row], **settings).questions()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "task.yaml: 'kind' must be given: choice, schema, cloze, generate"),
        ({"kind": "choices"}, r"task.yaml:2: there is no kind of task 'choices'; did you mean 'choice'\?"),
        ({"kind": "choice", "shot": 3}, r"task.yaml:3: shot: unknown key 'shot'; did you mean 'shots'\?"),
        ({"kind": "choice", "prompt": "{query.x}"}, "task.yaml:3: prompt: braces hold the name of a field, not 'query.x'"),
        ({"kind": "choice", "score": "unconditional"}, "score: unconditional needs `unconditional`"),
        ({"kind": "choice", "system": "Be brief."}, "system needs chat: true"),
        ({"kind": "generate", "verifier": "exactly"}, "task.yaml:3: verifier"),
    ],
)
def test_a_setting_that_is_not_valid_is_named_with_file_and_line(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        task_of(tmp_path, ANIMALS, **settings)


def test_more_examples_than_there_are_items_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match="3 examples need 4 items, and there are 3"):
        task_of(tmp_path, ANIMALS, kind="choice", shots=3)


def test_data_that_is_not_there_is_looked_for_in_the_folder_of_the_data(tmp_path):
    path = write_task(tmp_path, ANIMALS, kind="choice")
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    (tmp_path / "task.jsonl").rename(tmp_path / "data" / "deeper" / "task.jsonl")
    from bessemer.tasks.registry import read_task

    assert len(read_task(path, TaskOptions(data=tmp_path / "data")).questions()) == 3
    with pytest.raises(ArtefactError, match=r"there is no task.jsonl in .*; say where the data of tasks lies with --data"):
        read_task(path)
