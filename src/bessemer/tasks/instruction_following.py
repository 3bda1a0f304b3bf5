"""Instruction following: whether answers keep to constraints that a program can check (IFEval, Zhou et al. 2023).

The requests are those of a file, or are drawn by a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from bessemer.core.config import setting
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.records import Record
from bessemer.tasks.config import SampledConfig, TaskConfig, Template, fill
from bessemer.tasks.constraints import Constraints
from bessemer.tasks.file_task import Example, FileTask
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome

#: Names of the four accuracies, as in lm-evaluation-harness; the first is the headline.
PROMPT_STRICT, INSTRUCTION_STRICT = "prompt_level_strict_acc", "inst_level_strict_acc"
PROMPT_LOOSE, INSTRUCTION_LOOSE = "prompt_level_loose_acc", "inst_level_loose_acc"


class ConstraintsConfig(SampledConfig, TaskConfig):
    """Requests with constraints on the form of the answer."""

    kind: Literal["constraints"] = setting("constraints", "keep to constraints that a program checks")
    data: str = setting(
        "", "file with a request and its constraints in each row; empty: items that are made by the seed", affects_output=False
    )
    items: int = setting(100, "how many are made, without `data`", unit="items", ge=1)
    prompt: Template = setting("{prompt}", "the request, with fields in braces")
    constraints: str = setting(
        "constraints", "field that holds the list of constraints, each with its `kind` and its settings: {kind: no_commas}"
    )
    append_instructions: bool = setting(
        True, "write what the constraints ask for behind the request; false: the request says it already"
    )
    joiner: str = setting("\n\n", "text between a question and its answer")
    max_tokens: int = setting(512, "longest answer", unit="tokens", ge=1)


class ConstraintsTask(FileTask[ConstraintsConfig], GenerationTask):
    """Constraints over a file, or over items that are made by the seed."""

    def __init__(self, config: ConstraintsConfig, folders: list[Path]) -> None:
        if config.shots:
            raise ConfigError(f"task {config.name}: answers to a request with constraints are not in its data; leave out shots")
        super().__init__(config, folders)
        self.generation = config.generation
        self._constraints = [self._constraints_of(record) for record in self._items]

    def questions(self) -> list[GenerationQuestion]:
        return self._generation_questions(
            lambda item, row: self._prompter.context(item, row, self._request(item, row), self._example)
        )

    def headline(self, form: str) -> str:
        return PROMPT_STRICT

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        """IFEval's four accuracies: of prompts whose constraints all hold, and of constraints; strict and loose."""
        constraints = self._constraints[question.item]
        strict = [constraints.follows(text) for text in texts]
        loose = [constraints.follows(text, loose=True) for text in texts]
        scores = {
            PROMPT_STRICT: fmean(all(each) for each in strict),
            INSTRUCTION_STRICT: fmean(fmean(each) for each in strict),
            PROMPT_LOOSE: fmean(all(each) for each in loose),
            INSTRUCTION_LOOSE: fmean(fmean(each) for each in loose),
        }
        count = len(constraints.constraints)
        kinds = [constraint.kind for constraint in constraints.constraints]
        weights = {INSTRUCTION_STRICT: count, INSTRUCTION_LOOSE: count}
        return Outcome(scores, "\n\n".join(texts), strict, kinds, weights)

    def _read_rows(self, folders: list[Path]) -> list[Record]:
        if self._config.data:
            return super()._read_rows(folders)
        made = instruction_items(self._config.items, seed=self._config.seed)
        return [Record(values, number, f"item {number} of task {self.name}") for number, values in enumerate(made, start=1)]

    def _constraints_of(self, record: Record) -> Constraints:
        try:
            return Constraints.parse({"constraints": record.field(self._config.constraints)}, self._config.constraints)
        except ConfigError as error:
            raise record.error(str(error)) from None

    def _request(self, item: int, record: Record) -> str:
        request = fill(self._config.prompt, record)
        return f"{request} {self._constraints[item].instructions}" if self._config.append_instructions else request

    def _example(self, record: Record) -> Example:
        raise AssertionError("a task of constraints has no examples")


Settings = Mapping[str, Any]

_REQUESTS = (
    "Explain why the sky is blue.",
    "Describe how bread is made.",
    "Tell a story about a lighthouse keeper.",
    "Give advice to someone who moves to a new city.",
    "Explain what a library is to a child.",
    "Describe a walk through a forest in autumn.",
    "Say how a bicycle stays upright.",
    "Recommend a way to learn a language.",
    "Explain how a letter travels from sender to reader.",
    "Describe the work of a baker before sunrise.",
    "Say what makes a good neighbour.",
    "Explain why people keep diaries.",
    "Describe a market in a small town.",
    "Tell how rivers shape the land.",
    "Explain what happens when water boils.",
    "Describe a train journey at night.",
)
_WORDS = ("always", "bright", "common", "early", "morning", "quiet", "simple", "small", "water", "world")

#: Kinds that go together, at most one of each group: those of a group contradict each other.
_GROUPS: tuple[tuple[Callable[[random.Random], Settings], ...], ...] = (
    (
        lambda draw: {"kind": "words", "at_most": draw.choice((30, 50, 80))},
        lambda draw: {"kind": "words", "at_least": draw.choice((20, 40, 60))},
        lambda draw: {"kind": "sentences", "at_least": 1, "at_most": draw.choice((2, 3, 4))},
    ),
    (
        lambda draw: {"kind": "bullets", "at_least": (count := draw.choice((2, 3, 4))), "at_most": count},
        lambda draw: {"kind": "numbered_items", "at_least": (count := draw.choice((2, 3, 4))), "at_most": count},
        lambda draw: {"kind": "paragraphs", "at_least": (count := draw.choice((2, 3))), "at_most": count},
    ),
    (lambda draw: {"kind": "upper_case"}, lambda draw: {"kind": "lower_case"}),
    (
        lambda draw: {"kind": "required_words", "words": draw.sample(_WORDS, 2)},
        lambda draw: {"kind": "word_frequency", "word": draw.choice(_WORDS), "at_least": draw.choice((2, 3))},
        lambda draw: {"kind": "forbidden_words", "words": ["the", draw.choice(_WORDS)]},
    ),
    (lambda draw: {"kind": "no_commas"},),
    (lambda draw: {"kind": "ends_with", "text": draw.choice(("That is all", "Good luck"))}, lambda draw: {"kind": "quoted"}),
    (
        lambda draw: {"kind": "title"},
        lambda draw: {"kind": "starts_with", "text": draw.choice(("Here is my answer", "Let us begin"))},
    ),
    (
        lambda draw: {"kind": "placeholders", "at_least": draw.choice((1, 2))},
        lambda draw: {"kind": "highlights", "at_least": draw.choice((1, 2))},
    ),
)
#: An answer in quotation marks can have no title before it and cannot begin with other words.
_EXCLUDED = frozenset({frozenset({"quoted", "title"}), frozenset({"quoted", "starts_with"})})
_MOST_CONSTRAINTS = 3


def instruction_items(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows `{prompt, constraints}` with one to three constraints that do not contradict each other.

    A row depends on the seed and its number alone: a larger count begins with the same rows.
    """
    return [_item(random.Random(derive_seed(seed, "instructions", number))) for number in range(count)]


def _item(draw: random.Random) -> dict[str, Any]:
    request = draw.choice(_REQUESTS)
    wanted = draw.randint(1, _MOST_CONSTRAINTS)
    chosen: list[dict[str, Any]] = []
    for group in draw.sample(_GROUPS, len(_GROUPS)):
        constraint = dict(draw.choice(group)(draw))
        if len(chosen) < wanted and not any(frozenset({constraint["kind"], other["kind"]}) in _EXCLUDED for other in chosen):
            chosen.append(constraint)
    return {"prompt": request, "constraints": chosen}
