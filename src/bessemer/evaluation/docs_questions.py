"""The task `docs_questions`: questions on documentation, answered greedily and scored by exact match and ROUGE-L.

Held-in questions are part of SFT's training data: they measure memorisation. Held-out ones are about packages that no stage has
trained on.

A base model has not seen the chat template, so each model is prompted in two forms, with the template and as plain text
(`Question: …` / `Answer:`), on a few held-in questions first; the form with the higher ROUGE-L is used.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress
from bessemer.core.records import json_lines
from bessemer.evaluation.config import DOCS_QUESTIONS
from bessemer.evaluation.task_answerers import TaskForms, answers_in_better_form
from bessemer.inference.engine import Engine
from bessemer.tasks.questions import GenerationQuestion, GenerationSettings, GenerationTask, Outcome

_WORD = re.compile(r"\w+")


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are equal up to white space: runs count as one space, none at the ends."""
    return answer.split() == reference.split()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004, section 3) as F1 over lower-case words, 0 to 1.

    Precision and recall are the length of the longest common subsequence over the number of the answer's and of the reference's
    words; a word is a run of letters, digits and underscores. 0 when either text has none.
    """
    answer_words, reference_words = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    common = longest_common_subsequence(answer_words, reference_words)
    return 2 * common / (len(answer_words) + len(reference_words)) if common else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for item in first:
        diagonal = 0
        for index, candidate in enumerate(second, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if item == candidate else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]


EXACT_MATCH, ROUGE_L = "exact_match", "rouge_l"
HELD_IN, HELD_OUT = "held_in", "held_out"
CHAT, PLAIN = "chat", "plain"

#: Questions that a model answers in each prompt form, of which the better is used for all.
TRIAL_QUESTIONS = 32
#: Prefix of the sources of conversations that come from a task; these are evaluated as that task.
_OF_TASKS = "task/"
_PLAIN_STOPS = ("\n\n", "\nQuestion:")


@dataclass(frozen=True)
class DocsQuestion:
    """A conversation up to the assistant's last message, and that message."""

    messages: list[dict[str, str]]
    reference: str
    held: str


@dataclass(frozen=True)
class ScoredAnswer:
    """A model's answer to a question, and its scores."""

    question: DocsQuestion
    text: str
    exact_match: bool
    rouge_l: float


def read_questions(conversations: Path, count: int, seed: int) -> list[DocsQuestion]:
    """At most `count` questions of each set, sampled by the seed: held-in from `train.jsonl`, held-out from `validation.jsonl`.

    Raises ArtefactError when a file is missing or damaged.
    """
    questions = []
    for held, name in ((HELD_IN, "train.jsonl"), (HELD_OUT, "validation.jsonl")):
        available = _read_conversations(conversations / name)
        sampled = random.Random(derive_seed(seed, "questions", held)).sample(available, min(count, len(available)))
        questions += [DocsQuestion(messages[:-1], messages[-1]["content"], held) for messages in sampled]
    return questions


def _messages(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """The messages of a conversation; None of a text without roles."""
    if "messages" in record:
        return list(record["messages"])
    prompt, completion = record["prompt"], record["completion"]
    return None if isinstance(prompt, str) else [*prompt, *completion]


def _read_conversations(path: Path) -> list[list[dict[str, str]]]:
    try:
        records = json_lines(path.read_text(encoding="utf-8"))
        conversations = [
            messages
            for record in records
            if not record.get("source", "").startswith(_OF_TASKS) and (messages := _messages(record)) is not None
        ]
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file of conversations") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: these conversations are damaged ({error!r})") from None
    return [messages for messages in conversations if len(messages) > 1 and messages[-1]["role"] == "assistant"]


class DocsQuestions(GenerationTask):
    """Questions in one form. Scores: `rouge_l`, and `exact_match`."""

    name = DOCS_QUESTIONS

    def __init__(self, questions: Sequence[DocsQuestion], form: str, max_new_tokens: int) -> None:
        """form: `chat`, or `plain`."""
        self._questions = questions
        self._form = form
        self.generation = GenerationSettings(max_new_tokens, stop=() if form == CHAT else _PLAIN_STOPS)

    def questions(self) -> list[GenerationQuestion]:
        return [
            GenerationQuestion(
                item, tuple(question.messages) if self._form == CHAT else plain_prompt(question.messages), self._form
            )
            for item, question in enumerate(self._questions)
        ]

    def headline(self, form: str) -> str:
        return ROUGE_L

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        reference = self._questions[question.item].reference
        text = texts[0].strip()
        scores = {ROUGE_L: rouge_l(text, reference), EXACT_MATCH: float(exact_match(text, reference))}
        return Outcome(scores, text, gold=reference)


def answer_questions(
    engine: Engine, questions: Sequence[DocsQuestion], *, max_new_tokens: int, progress: Progress, name: str
) -> tuple[str, list[ScoredAnswer]]:
    """The better prompt form of the model, and its answers in the order of the questions.

    A question that leaves no room for an answer of `max_new_tokens` in the model's context is cut from the left.
    """
    trial = [number for number, question in enumerate(questions) if question.held == HELD_IN][:TRIAL_QUESTIONS]
    forms = TaskForms({form: DocsQuestions(questions, form, max_new_tokens) for form in (CHAT, PLAIN)})
    with progress.task(f"answer questions: {name}", total=len(trial) + len(questions), unit="answers") as bar:
        form, outcomes = answers_in_better_form(engine, forms, trial, bar.advance)
    return form, [
        ScoredAnswer(question, outcome.answer, bool(outcome.scores[EXACT_MATCH]), outcome.scores[ROUGE_L])
        for question, outcome in zip(questions, outcomes, strict=True)
    ]


def plain_prompt(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as plain text for a model without a chat template to continue."""
    words = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    return "".join(f"{words[message['role']]}{message['content']}\n" for message in messages) + "Answer:"
