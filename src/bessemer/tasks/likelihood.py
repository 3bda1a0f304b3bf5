"""Kinds of task that are judged by likelihood: multiple choice, schemas and cloze.

Multiple choice: each choice behind the question (cloze form), or a letter behind the list of choices; longer choices are less
likely, so log-likelihoods are compared after a normalisation. Schema: one continuation behind several contexts, of which the
one that makes it likeliest is chosen (Winograd). Cloze: whether greedy decoding writes a given continuation (LAMBADA, Paperno
et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from pathlib import Path
from string import ascii_uppercase

from bessemer.core.records import Record
from bessemer.tasks.config import ChoiceConfig, ClozeConfig, SchemaConfig, fill
from bessemer.tasks.file_task import Example, FileTask, gold_of, options_of
from bessemer.tasks.questions import ContinuationRequest, ContinuationScore, LikelihoodQuestion, LikelihoodTask, Outcome


class ChoiceTask(FileTask[ChoiceConfig], LikelihoodTask):
    """Multiple choice over a file. With `form: best` both forms are scored (OLMES, Gu et al. 2024, section 3.3)."""

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
        parts = [ContinuationRequest(context, choices)]
        if self._config.unconditional is not None:
            # a space before the choices, as behind the question
            parts.append(ContinuationRequest(self._config.unconditional.rstrip() + " ", choices))
        return LikelihoodQuestion(item, "cloze", tuple(parts), self._ids[item], self._clusters[item])

    def _cloze_example(self, record: Record) -> Example:
        choices = options_of(record, self._config.choices)
        return Example(fill(self._config.prompt, record), choices[gold_of(record, self._config.gold, len(choices))])

    def _letters(self, item: int, record: Record) -> LikelihoodQuestion:
        letters = tuple(ascii_uppercase[: len(self._choices[item])])
        context = self._prompter.context(
            item, record, self._lettered(record), self._letters_example, self._config.letter_joiner
        )
        return LikelihoodQuestion(
            item, "letters", (ContinuationRequest(context, letters),), self._ids[item], self._clusters[item]
        )

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
        # per token, since a tokenizer may split the continuation differently after another context
        chosen = greatest([score.total / len(score.token_ids) for (score,) in scores])
        gold = self._gold[question.item]
        return Outcome({"accuracy": float(chosen == gold)}, self._options[question.item][chosen], chosen, gold)

    def _question(self, item: int, record: Record) -> LikelihoodQuestion:
        continuation = fill(self._config.continuation, record)
        if not continuation.strip():
            raise record.error("the continuation is empty")
        contexts = [self._prompter.context(item, record, option, self._example) for option in self._options[item]]
        parts = tuple(ContinuationRequest(context, (continuation,)) for context in contexts)
        return LikelihoodQuestion(item, "schema", parts, self._ids[item], self._clusters[item])

    def _example(self, record: Record) -> Example:
        options = options_of(record, self._config.options)
        gold = gold_of(record, self._config.gold, len(options))
        return Example(options[gold], fill(self._config.continuation, record))


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
        return LikelihoodQuestion(
            item, "cloze", (ContinuationRequest(context, (example.answer,)),), self._ids[item], self._clusters[item]
        )

    def _example(self, record: Record) -> Example:
        continuation = fill(self._config.continuation, record)
        if not continuation.strip():
            raise record.error("the continuation is empty")
        return Example(fill(self._config.prompt, record), continuation)


def choice_scores(
    scores: Sequence[ContinuationScore], choices: Sequence[str], alone: Sequence[ContinuationScore] | None = None
) -> dict[str, list[float]]:
    """Of each normalisation, a number for each choice, of which the greatest is chosen. In nats, or nats per unit.

    alone: the choices' scores without the question. `characters` is acc_norm of lm-evaluation-harness, `bytes` its acc_bytes,
    `unconditional` its acc_mutual_info (Brown et al. 2020, section 2.4, as a difference of logarithms). `distinct_tokens`
    leaves out the tokens that all choices begin with (CORE).
    """
    totals = [score.total for score in scores]
    common = _common_tokens([score.token_ids for score in scores])
    compared = {
        "raw": totals,
        "tokens": [total / len(score.token_ids) for total, score in zip(totals, scores, strict=True)],
        "characters": [total / len(choice) for total, choice in zip(totals, choices, strict=True)],
        "bytes": [total / len(choice.encode()) for total, choice in zip(totals, choices, strict=True)],
        "distinct_tokens": [sum(score.log_probs[common:]) / (len(score.log_probs) - common) for score in scores],
    }
    if alone is not None:
        compared["unconditional"] = [total - score.total for total, score in zip(totals, alone, strict=True)]
    return compared


def _common_tokens(token_ids: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning, at most one less than the shortest."""
    shortest = min(map(len, token_ids))
    return next((place for place in range(shortest - 1) if len({ids[place] for ids in token_ids}) > 1), shortest - 1)


def greatest(values: Sequence[float]) -> int:
    """Where the greatest value stands; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)
