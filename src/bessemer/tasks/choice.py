"""Multiple choice by likelihood: each choice behind the question (cloze form), or a letter behind the list of choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from bessemer.core.records import Record
from bessemer.tasks.choice_scores import choice_scores, greatest
from bessemer.tasks.config import ChoiceConfig
from bessemer.tasks.file_task import FileTask, gold_of, options_of
from bessemer.tasks.prompting import Example
from bessemer.tasks.questions import ContinuationScore, LikelihoodQuestion, LikelihoodTask, Outcome, Part
from bessemer.tasks.template import fill


class ChoiceTask(FileTask[ChoiceConfig], LikelihoodTask):
    """Multiple choice over a file. With `form: best` both forms are asked (OLMES, Gu et al. 2024, section 3.3)."""

    def __init__(self, config: ChoiceConfig, folders: list[Path]) -> None:
        super().__init__(config, folders)
        self._choices = [options_of(record, config.choices) for record in self._items]
        self._gold = [
            gold_of(record, config.gold, len(choices)) for record, choices in zip(self._items, self._choices, strict=True)
        ]
        self.chance = self._guessing(self._choices)

    def questions(self) -> list[LikelihoodQuestion]:
        forms = ("cloze", "letters") if self._config.form == "best" else (self._config.form,)
        ask = {"cloze": self._cloze, "letters": self._letters}
        return [ask[form](item, record) for form in forms for item, record in enumerate(self._items)]

    def headline(self, form: str) -> str:
        return "raw" if form == "letters" else self._config.score

    def judge(self, question: LikelihoodQuestion, scores: Sequence[Sequence[ContinuationScore]]) -> Outcome:
        gold, choices = self._gold[question.item], self._choices[question.item]
        if question.form == "letters":
            compared = {"raw": [score.total for score in scores[0]]}
        else:
            compared = choice_scores(scores[0], choices, scores[1] if len(scores) > 1 else None)
        chosen = {name: greatest(values) for name, values in compared.items()}
        right = {name: float(index == gold) for name, index in chosen.items()}
        index = chosen[self.headline(question.form)]
        return Outcome(right, choices[index], index, gold)

    def _cloze(self, item: int, record: Record) -> LikelihoodQuestion:
        choices = tuple(self._choices[item])
        context = self._prompter.context(item, record, fill(self._config.prompt, record), self._cloze_example)
        parts = [Part(context, choices)]
        if self._config.unconditional is not None:
            # a space before the choices, as behind the question
            parts.append(Part(self._config.unconditional.rstrip() + " ", choices))
        return LikelihoodQuestion(item, "cloze", tuple(parts), self._ids[item], self._clusters[item])

    def _cloze_example(self, record: Record) -> Example:
        choices = options_of(record, self._config.choices)
        return Example(fill(self._config.prompt, record), choices[gold_of(record, self._config.gold, len(choices))])

    def _letters(self, item: int, record: Record) -> LikelihoodQuestion:
        letters = tuple(ascii_uppercase[: len(self._choices[item])])
        context = self._prompter.context(
            item, record, self._lettered(record), self._letters_example, self._config.letter_joiner
        )
        return LikelihoodQuestion(item, "letters", (Part(context, letters),), self._ids[item], self._clusters[item])

    def _letters_example(self, record: Record) -> Example:
        gold = gold_of(record, self._config.gold, len(options_of(record, self._config.choices)))
        return Example(self._lettered(record), ascii_uppercase[gold])

    def _lettered(self, record: Record) -> str:
        choices = options_of(record, self._config.choices)
        if len(choices) > len(ascii_uppercase):
            raise record.error(f"{len(choices)} choices are more than there are letters; ask in the cloze form")
        line = self._config.letter_line
        lines = [
            line.replace("{letter}", letter).replace("{choice}", choice)
            for letter, choice in zip(ascii_uppercase, choices, strict=False)
        ]
        return "\n".join([fill(self._config.prompt, record).rstrip(), *lines])
