"""Schemas: one continuation behind several contexts, of which the one that makes it likeliest is chosen (Winograd)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bessemer.core.records import Record
from bessemer.tasks.choice_scores import greatest
from bessemer.tasks.config import SchemaConfig
from bessemer.tasks.file_task import FileTask, gold_of, options_of
from bessemer.tasks.prompting import Example
from bessemer.tasks.questions import ContinuationScore, LikelihoodQuestion, LikelihoodTask, Outcome, Part
from bessemer.tasks.template import fill


class SchemaTask(FileTask[SchemaConfig], LikelihoodTask):
    """Schemas over a file: the partial evaluation of Trinh and Le (2018), which scores only what the contexts share."""

    def __init__(self, config: SchemaConfig, folders: list[Path]) -> None:
        super().__init__(config, folders)
        self._options = [options_of(record, config.options) for record in self._items]
        self._gold = [
            gold_of(record, config.gold, len(options)) for record, options in zip(self._items, self._options, strict=True)
        ]
        self.chance = self._guessing(self._options)

    def questions(self) -> list[LikelihoodQuestion]:
        return [self._question(item, record) for item, record in enumerate(self._items)]

    def headline(self, form: str) -> str:
        return "accuracy"

    def judge(self, question: LikelihoodQuestion, scores: Sequence[Sequence[ContinuationScore]]) -> Outcome:
        # per token, since a tokenizer may cut the continuation otherwise behind another context
        chosen = greatest([score.total / len(score.token_ids) for (score,) in scores])
        gold = self._gold[question.item]
        return Outcome({"accuracy": float(chosen == gold)}, self._options[question.item][chosen], chosen, gold)

    def _question(self, item: int, record: Record) -> LikelihoodQuestion:
        continuation = fill(self._config.continuation, record)
        if not continuation.strip():
            raise record.error("the continuation is empty")
        contexts = [self._prompter.context(item, record, option, self._example) for option in self._options[item]]
        parts = tuple(Part(context, (continuation,)) for context in contexts)
        return LikelihoodQuestion(item, "schema", parts, self._ids[item], self._clusters[item])

    def _example(self, record: Record) -> Example:
        options = options_of(record, self._config.options)
        gold = gold_of(record, self._config.gold, len(options))
        return Example(options[gold], fill(self._config.continuation, record))
