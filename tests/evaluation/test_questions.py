import json
from dataclasses import dataclass

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Silent
from bessemer.evaluation.docs_questions import HELD_IN, HELD_OUT, DocsQuestion, answer_questions, plain_prompt, read_questions

QUESTIONS = [
    DocsQuestion([{"role": "user", "content": f"What does f{number} do?"}], f"It returns {number}.", held)
    for held in (HELD_IN, HELD_OUT)
    for number in range(3)
]


@dataclass
class Completion:
    text: str
    finish_reason: str = "stop"
    cached_tokens: int = 0
    others: tuple = ()


class Tokens:
    """A token a word, with a mark before a chat's."""

    bos_id, begin_ids = 0, ()

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return ["chat", *messages[-1]["content"].split()]

    def encode(self, text):
        return ["plain", *text.split()]


class KnowingEngine:
    """Answers rightly when it is asked in its own way."""

    context_length = 100

    def __init__(self, form):
        self.form, self.tokenizer, self.params, self.prompts = form, Tokens(), [], []

    def generate(self, prompts, params):
        self.params += params
        self.prompts += prompts
        names = [next(word for word in prompt if word[0] == "f" and word[1:].isdigit()) for prompt in prompts]
        return [
            Completion(f" It returns {name[1:]}.\n" if prompt[0] == self.form else "no idea")
            for prompt, name in zip(prompts, names, strict=True)
        ]


def answered(engine):
    return answer_questions(engine, QUESTIONS, max_new_tokens=9, progress=Silent(), name="model")


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_a_model_is_asked_in_the_way_that_suits_it(form):
    asked_as, answers = answered(KnowingEngine(form))
    assert asked_as == form
    assert [answer.question for answer in answers] == QUESTIONS
    assert all(answer.exact_match and answer.rouge_l == 1 for answer in answers)


def test_answers_are_greedy_and_plain_ones_end_at_an_empty_line():
    engine = KnowingEngine("plain")
    answered(engine)
    assert {params.temperature for params in engine.params} == {0.0}
    assert {params.max_tokens for params in engine.params} == {9}
    assert [bool(params.stop) for params in engine.params] == [prompt[0] == "plain" for prompt in engine.prompts]


def test_what_was_asked_to_choose_the_form_is_not_asked_again():
    engine = KnowingEngine("plain")
    answered(engine)
    assert [prompt[0] for prompt in engine.prompts] == ["chat"] * 3 + ["plain"] * 6


def test_a_question_that_fills_the_context_is_cut_from_the_left():
    engine = KnowingEngine("chat")
    engine.context_length = 8
    _, answers = answered(engine)
    assert max(map(len, engine.prompts)) == 4 and len(answers) == 6


def test_a_plain_prompt_ends_where_the_answer_begins():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And?"},
    ]
    assert plain_prompt(messages) == "Be brief.\nQuestion: Why?\nAnswer: So.\nQuestion: And?\nAnswer:"


def write_conversations(folder, held_in=5, held_out=3):
    folder.mkdir()
    for name, count in (("train", held_in), ("validation", held_out)):
        lines = [
            {"messages": [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"{name} {i}"}]}
            for i in range(count)
        ]
        # with a character at which `str.splitlines` breaks
        lines[-1]["messages"].insert(0, {"role": "system", "content": "a\u2028b"})
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    return folder


def test_questions_are_drawn_from_both_sets_by_the_seed(tmp_path):
    folder = write_conversations(tmp_path / "conversations")
    drawn = read_questions(folder, 4, seed=1)
    assert [question.held for question in drawn] == [HELD_IN] * 4 + [HELD_OUT] * 3
    assert all(question.reference + "?" == question.messages[-1]["content"] for question in drawn)
    assert drawn == read_questions(folder, 4, seed=1)
    assert drawn != read_questions(folder, 4, seed=2)


def test_damaged_conversations_are_refused(tmp_path):
    folder = write_conversations(tmp_path / "conversations")
    (folder / "validation.jsonl").write_text('{"messages": [{"role"', encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"validation\.jsonl: these conversations are damaged"):
        read_questions(folder, 4, seed=1)
    (folder / "train.jsonl").unlink()
    with pytest.raises(ArtefactError, match="no such file of conversations"):
        read_questions(folder, 4, seed=1)
