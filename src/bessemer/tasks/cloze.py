"""Cloze: whether greedy decoding writes a given continuation (LAMBADA, Paperno et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from bessemer.core.records import Record
from bessemer.tasks.config import ClozeConfig
from bessemer.tasks.file_task import FileTask
from bessemer.tasks.prompting import Example
from bessemer.tasks.questions import ContinuationScore, LikelihoodQuestion, LikelihoodTask, Outcome, Part
from bessemer.tasks.template import fill


class ClozeTask(FileTask[ClozeConfig], LikelihoodTask):
    """Continuations over a file."""

    def questions(self) -> list[LikelihoodQuestion]:
        return [self._question(item, record) for item, record in enumerate(self._items)]

    def headline(self, form: str) -> str:
        return "accuracy"

    def judge(self, question: LikelihoodQuestion, scores: Sequence[Sequence[ContinuationScore]]) -> Outcome:
        score = scores[0][0]
        (continuation,) = question.parts[0].continuations
        worth = {"accuracy": float(score.is_greedy), "probability": exp(score.total)}
        return Outcome(worth, continuation if score.is_greedy else "", gold=continuation)

    def _question(self, item: int, record: Record) -> LikelihoodQuestion:
        example = self._example(record)
        context = self._prompter.context(item, record, example.question, self._example)
        return LikelihoodQuestion(item, "cloze", (Part(context, (example.answer,)),), self._ids[item], self._clusters[item])

    def _example(self, record: Record) -> Example:
        continuation = fill(self._config.continuation, record)
        if not continuation.strip():
            raise record.error("the continuation is empty")
        return Example(fill(self._config.prompt, record), continuation)
