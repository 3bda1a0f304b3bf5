"""Generation: answers that a verifier judges, one or several to an item; pass@k and majority over the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from pathlib import Path

from bessemer.core.records import Record
from bessemer.tasks.config import GenerateConfig, fill
from bessemer.tasks.file_task import Example, FileTask
from bessemer.tasks.questions import Context, GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.verifiers import Verifier


class GenerateTask(FileTask[GenerateConfig], GenerationTask):
    """Generated answers over a file."""

    def __init__(self, config: GenerateConfig, folders: list[Path]) -> None:
        super().__init__(config, folders)
        self.generation = config.generation
        self._references = [self._references_of(record) for record in self._items]

    def questions(self) -> list[GenerationQuestion]:
        return self._generation_questions(self._context)

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        return verified_samples(self._config.verifier, texts, self._references[question.item])

    def headline(self, form: str) -> str:
        return self._config.verifier.graded or "accuracy"

    def _context(self, item: int, record: Record) -> Context:
        context = self._prompter.context(item, record, fill(self._config.prompt, record), self._example)
        if not isinstance(context, str):
            return context
        # the space before the answer is left to the model: tokenizers join it to the next word
        joiner = self._config.joiner
        return context.removesuffix(joiner) + joiner.rstrip()

    def _references_of(self, record: Record) -> list[str]:
        first, *others = self._config.answers
        references = record.texts(first)
        for name in others:
            references += record.texts(name) if record.values.get(name) is not None else []
        references = list(dict.fromkeys(references))
        if not references:
            raise record.error(f"{first!r} holds no right answer")
        for reference in references:
            refusal = self._config.verifier.refusal(reference)
            if refusal is not None:
                raise record.error(f"the right answer {reference!r} {refusal}")
        return references

    def _example(self, record: Record) -> Example:
        target = self._config.target
        answer = self._references_of(record)[0] if target is None else fill(target, record)
        return Example(fill(self._config.prompt, record), answer)


def verified_samples(verifier: Verifier, texts: Sequence[str], references: Sequence[str]) -> Outcome:
    """`accuracy` is the share of right samples; of several also `pass@k` for powers of two and all, and `maj@k`. A verifier
    that grades adds the mean of its grades."""
    answers = [verifier.answer(text) for text in texts]
    right = [answer is not None and verifier.accepts(answer, references) for answer in answers]
    scores = {"accuracy": sum(right) / len(texts), **pass_at_powers(len(texts), sum(right))}
    if verifier.graded is not None:
        scores[verifier.graded] = sum(verifier.grade(text, references) for text in texts) / len(texts)
    if len(texts) > 1:
        commonest = majority(answers)
        scores[f"maj@{len(texts)}"] = float(commonest is not None and right[commonest])
    chosen = [None if answer is None else str(answer) for answer in answers]
    return Outcome(scores, "\n\n".join(texts), chosen, list(references))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of k samples is right: 1 − C(n − c, k) / C(n, k), unbiased (Chen et al. 2021, eq. 1).

    samples: n, of which `right`, c, are right. Raises ValueError for k outside 1 … n or c outside 0 … n.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {right} right: k must be 1 to n, and c at most n")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def pass_at_powers(samples: int, right: int) -> dict[str, float]:
    """`pass@k` for k of 2, 4, 8 … and all samples; empty for a single sample, whose pass@1 is its score."""
    if samples == 1:
        return {}
    sizes = [size for power in range(1, samples.bit_length()) if (size := 1 << power) < samples]
    return {f"pass@{k}": pass_at_k(samples, right, k) for k in [*sizes, samples]}


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Where the commonest answer stands first; of equally common ones the first, None where there is no answer at all.

    None is a sample without an answer, which has no vote (Wang et al. 2022, section 2).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None
