"""The task `docs_questions`: questions on documentation, answered greedily and scored against reference answers.

Held-in questions are part of SFT's training data: they measure memorisation. Held-out ones are about packages that no stage has
trained on.

A base model has not seen the chat template, so each model is prompted in two forms, with the template and as plain text
(`Question: …` / `Answer:`), on a few held-in questions first; the form with the higher ROUGE-L is used.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Progress
from bessemer.core.seeds import derive_seed
from bessemer.evaluation.text import exact_match, rouge_l
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams

HELD_IN, HELD_OUT = "held_in", "held_out"
CHAT, PLAIN = "chat", "plain"

_TRIAL_QUESTIONS = 32
_AT_ONCE = 64
_PLAIN_STOPS = ["\n\n", "\nQuestion:"]


@dataclass(frozen=True)
class Question:
    """A conversation up to the assistant's last message, and that message."""

    messages: list[dict[str, str]]
    reference: str
    held: str


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question, and its scores."""

    question: Question
    text: str
    exact_match: bool
    rouge_l: float


def read_questions(conversations: Path, count: int, seed: int) -> list[Question]:
    """At most `count` questions of each set, sampled by the seed: held-in from `train.jsonl`, held-out from `validation.jsonl`.

    Raises ArtefactError when a file is missing or damaged.
    """
    questions = []
    for held, name in ((HELD_IN, "train.jsonl"), (HELD_OUT, "validation.jsonl")):
        available = _read_conversations(conversations / name)
        sampled = random.Random(derive_seed(seed, "questions", held)).sample(available, min(count, len(available)))
        questions += [Question(messages[:-1], messages[-1]["content"], held) for messages in sampled]
    return questions


def _read_conversations(path: Path) -> list[list[dict[str, str]]]:
    try:
        conversations = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file of conversations") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: these conversations are damaged ({error!r})") from None
    return [messages for messages in conversations if len(messages) > 1 and messages[-1]["role"] == "assistant"]


def answer_questions(
    engine: Engine, questions: Sequence[Question], *, max_new_tokens: int, progress: Progress, name: str
) -> tuple[str, list[Answer]]:
    """The better prompt form of the model, and its answers in the order of the questions.

    An answer ends at `max_new_tokens` or at the end of the context; a question that fills the context gets an empty answer.
    """
    trial = [question for question in questions if question.held == HELD_IN][:_TRIAL_QUESTIONS]
    with progress.task(f"answer questions: {name}", total=2 * len(trial) + len(questions), unit="answers") as task:
        scores = {}
        for form in (CHAT, PLAIN):
            scores[form] = sum(answer.rouge_l for answer in _answer(engine, trial, form, max_new_tokens))
            task.advance(len(trial))
        form = CHAT if scores[CHAT] >= scores[PLAIN] else PLAIN
        answers = []
        for start in range(0, len(questions), _AT_ONCE):
            answers += _answer(engine, questions[start : start + _AT_ONCE], form, max_new_tokens)
            task.reach(2 * len(trial) + len(answers))
    return form, answers


def _answer(engine: Engine, questions: Sequence[Question], form: str, max_new_tokens: int) -> list[Answer]:
    prompts = [
        engine.tokenizer.apply_chat_template(question.messages, add_generation_prompt=True)
        if form == CHAT
        else engine.tokenizer.encode(plain_prompt(question.messages))
        for question in questions
    ]
    stops = [] if form == CHAT else _PLAIN_STOPS
    params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0, stop=stops)
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) < engine.context_length]
    texts = [""] * len(prompts)
    for index, completion in zip(fitting, engine.generate([prompts[index] for index in fitting], params), strict=True):
        texts[index] = completion.text.strip()
    return [
        Answer(question, text, exact_match(text, question.reference), rouge_l(text, question.reference))
        for question, text in zip(questions, texts, strict=True)
    ]


def plain_prompt(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as plain text for a model without a chat template to continue."""
    words = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    return "".join(f"{words[message['role']]}{message['content']}\n" for message in messages) + "Answer:"
