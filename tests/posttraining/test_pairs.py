"""Pairs that are made from conversations."""

import pytest

from bessemer.core.errors import ConfigError, SourceError
from bessemer.posttraining.data.examples import Conversation, gather_pairs, write_conversations
from bessemer.posttraining.data.made import MISMATCHED
from bessemer.posttraining.preference.config import PreferenceConfig
from tests.posttraining.test_formats import said


def conversation(question, answer, source="made/docs_questions"):
    return Conversation.of((said("user", question), said("assistant", answer)), source)


def test_a_wrong_answer_is_a_right_one_to_another_question_in_turn_of_its_kind_and_of_another(tmp_path):
    made = [conversation(f"What does `f{n}` do?", f"It does {n}.") for n in range(20)]
    made += [conversation(f"Which module defines `g{n}`?", f"It is in m{n % 2}.") for n in range(10)]
    sums = [conversation(f"1 + {n} =", str(n + 1), "task/sums") for n in range(4)]
    write_conversations(tmp_path / "train.jsonl", [*made, *sums])
    write_conversations(tmp_path / "validation.jsonl", [conversation("What does `h` do?", "It rests.")])
    training, held_out = gather_pairs([MISMATCHED], tmp_path, {MISMATCHED: tmp_path}, 0.5, seed=1)
    right = {one.messages[0]["content"]: one.messages[1]["content"] for one in made}
    assert 20 < len(training) <= 30 and not held_out, "a single question has no wrong answer"
    alike = 0
    for pair in training:
        question, chosen, rejected = pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]
        assert chosen == right[question] != rejected
        assert rejected in right.values()
        alike += rejected in {answer for other, answer in right.items() if other.split()[:2] == question.split()[:2]}
    assert len(training) / 3 < alike <= len(training) / 2
    with pytest.raises(SourceError, match="made/mismatched is made by a stage of a recipe"):
        gather_pairs([MISMATCHED], tmp_path, {}, 0.5, seed=1)


def test_another_right_answer_to_the_same_question_is_not_a_wrong_one(tmp_path):
    made = [conversation(f"What does `f{n % 5}` do?", f"It does {n}.") for n in range(20)]
    write_conversations(tmp_path / "train.jsonl", made)
    write_conversations(tmp_path / "validation.jsonl", [])
    right = {(one.messages[0]["content"], one.messages[1]["content"]) for one in made}
    for seed in range(5):
        training, _ = gather_pairs([MISMATCHED], tmp_path, {MISMATCHED: tmp_path}, 0.0, seed=seed)
        assert len(training) > 10
        assert not [pair for pair in training if (pair.prompt[0]["content"], pair.rejected[0]["content"]) in right]


def test_names_and_losses_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="nor made pairs; did you mean 'made/mismatched'"):
        PreferenceConfig.parse({"data": ["made/mismatch"]}, "preference")
    with pytest.raises(ConfigError, match="kto learns from single answers"):
        PreferenceConfig.parse({"data": [MISMATCHED], "loss": "kto"}, "preference")
