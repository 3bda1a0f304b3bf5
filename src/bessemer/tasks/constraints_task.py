"""Instruction following: whether answers keep to constraints that a program can check (IFEval, Zhou et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from bessemer.core.config import setting
from bessemer.core.errors import ConfigError
from bessemer.core.records import Record
from bessemer.tasks.config import SampledConfig, TaskConfig
from bessemer.tasks.constraints import Constraints
from bessemer.tasks.file_task import FileTask
from bessemer.tasks.generated.instructions import instruction_items
from bessemer.tasks.prompting import Example
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.template import Template, fill

#: Names of the four accuracies, as in lm-evaluation-harness; the first is the headline.
PROMPT_STRICT, INSTRUCTION_STRICT = "prompt_level_strict_acc", "inst_level_strict_acc"
PROMPT_LOOSE, INSTRUCTION_LOOSE = "prompt_level_loose_acc", "inst_level_loose_acc"


class ConstraintsConfig(SampledConfig, TaskConfig):
    """Requests with constraints on the form of the answer."""

    kind: Literal["constraints"] = setting("constraints", "keep to constraints that a program checks")
    data: str = setting(
        "",
        "file with a request and its constraints in each row; empty: items that are made by the seed",
        affects_output=False,
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
        return [
            GenerationQuestion(
                item,
                self._prompter.context(item, record, self._request(item, record), self._example),
                id=self._ids[item],
                cluster=self._clusters[item],
            )
            for item, record in enumerate(self._items)
        ]

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
