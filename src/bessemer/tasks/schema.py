"""Schemas: one continuation behind several contexts, of which the one that makes it likeliest is chosen (Winograd)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bessemer.tasks.choice_scores import greatest
from bessemer.tasks.config import SchemaConfig
from bessemer.tasks.file_task import chance_of, gold_of, options_of, read_rows
from bessemer.tasks.prompting import Example
from bessemer.tasks.questions import ContinuationScore, LikelihoodQuestion, LikelihoodTask, Outcome, Part
from bessemer.tasks.records import Record
from bessemer.tasks.template import fill


class SchemaTask(LikelihoodTask):
    """Schemas over a file: the partial evaluation of Trinh and Le (2018), which scores only what the contexts share."""

    def __init__(self, config: SchemaConfig, folders: list[Path]) -> None:
        """Raises ArtefactError where the data does not fit the settings, with file and line."""
        self.name = config.name
        self.settings = config.output_settings()
        self.shots = config.shots
        self._config = config
        self._rows = read_rows(config, folders)
        self._options = [options_of(record, config.options) for record in self._rows.items]
        self._gold = [
            gold_of(record, config.gold, len(options)) for record, options in zip(self._rows.items, self._options, strict=True)
        ]
        self.chance = chance_of(config, list(map(len, self._options)))

    def questions(self) -> list[LikelihoodQuestion]:
        return [self._question(item, record) for item, record in enumerate(self._rows.items)]

    def headline(self, form: str) -> str:
        return "accuracy"

    def judge(self, question: LikelihoodQuestion, scores: Sequence[Sequence[ContinuationScore]]) -> Outcome:
        # per token, since a tokenizer may cut the continuation otherwise behind another context
        chosen = greatest([score.total / len(score.token_ids) for (score,) in scores])
        gold = self._gold[question.item]
        return Outcome({"accuracy": float(chosen == gold)}, chosen, gold)

    def _question(self, item: int, record: Record) -> LikelihoodQuestion:
        continuation = fill(self._config.continuation, record)
        if not continuation.strip():
            raise record.error("the continuation is empty")
        contexts = [self._rows.prompter.context(item, record, option, self._example) for option in self._options[item]]
        return LikelihoodQuestion(item, "schema", tuple(Part(context, (continuation,)) for context in contexts))

    def _example(self, record: Record) -> Example:
        options = options_of(record, self._config.options)
        gold = gold_of(record, self._config.gold, len(options))
        return Example(options[gold], fill(self._config.continuation, record))
