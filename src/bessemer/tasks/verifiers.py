"""Verifiers: whether a generated text gives the right answer.

A verifier is at once its settings in a task file. `answer` finds what a text answers, in a form that can be compared and
counted. `accepts` says whether that is one of the references.
"""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from bessemer.core.config import Config, setting
from bessemer.tasks.numbers import answered_number, whole_number

_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»…")


class _Verifier(Config):
    @abstractmethod
    def answer(self, text: str) -> Hashable | None:
        """The answer that a text gives; None when it gives none."""

    @abstractmethod
    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        """Whether an answer that `answer` found is one of the references."""

    def refusal(self, reference: str) -> str | None:
        """Why a reference cannot be one; None when it can."""
        return None if reference.strip() else "is empty"

    def verify(self, text: str, references: Sequence[str]) -> bool:
        """Whether a text gives one of the references as its answer."""
        answer = self.answer(text)
        return answer is not None and self.accepts(answer, references)


def checked_pattern(pattern: str) -> str:
    """The pattern itself. Raises ValueError when it is no regular expression of Python."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return pattern


class _Normalising(_Verifier):
    ignore_case: bool = setting(True, "A and a are equal")
    ignore_punctuation: bool = setting(True, "leave out ASCII punctuation and typographic quotes")
    ignore_articles: bool = setting(True, "leave out a, an and the")

    def normal(self, text: str) -> str:
        """The text as it is compared; what would leave nothing is not left out."""
        plain = " ".join(text.split())
        shorter = plain.casefold() if self.ignore_case else plain
        if self.ignore_punctuation:
            shorter = shorter.translate(_PUNCTUATION)
        if self.ignore_articles:
            shorter = _ARTICLES.sub(" ", shorter)
        return " ".join(shorter.split()) or plain

    def answer(self, text: str) -> str | None:
        return self.normal(text) or None


class Exact(_Normalising):
    """The whole text is a reference, after the normalisation of SQuAD (Rajpurkar et al. 2016, section 6.1)."""

    method: Literal["exact"] = setting("exact", "the whole text is the answer")

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        return answer in {self.normal(reference) for reference in references}


class Contains(_Normalising):
    """A reference stands in the text, as whole words."""

    method: Literal["contains"] = setting("contains", "the answer stands in the text, as whole words")

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        normal = (self.normal(reference) for reference in references)
        return any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", str(answer)) for each in normal)


class Numeric(_Verifier):
    """A number of the text is a reference, compared exactly as fractions."""

    method: Literal["numeric"] = setting("numeric", "a number in the text is the answer; behind #### if that is there")
    pick: Literal["last", "first"] = setting("last", "which number of the text")
    relative_tolerance: float = setting(0.0, "how far off the answer may be, as a share of the reference", ge=0, lt=1)

    def answer(self, text: str) -> Fraction | None:
        return answered_number(text, self.pick)

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        assert isinstance(answer, Fraction)
        numbers = [number for each in references if (number := whole_number(each)) is not None]
        return any(abs(answer - number) <= Fraction(self.relative_tolerance) * abs(number) for number in numbers)

    def refusal(self, reference: str) -> str | None:
        return None if whole_number(reference) is not None else "is not a number"


class Pattern(_Normalising):
    """What a regular expression finds in the text is a reference, after the normalisation of `exact`."""

    method: Literal["regex"] = setting("regex", "what a regular expression finds is the answer")
    pattern: str = setting(description="regular expression of Python; its first group is the answer, without groups all of it")
    pick: Literal["last", "first"] = setting("last", "which match")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return checked_pattern(pattern)

    def answer(self, text: str) -> str | None:
        found = list(re.finditer(self.pattern, text))
        if not found:
            return None
        match = found[-1 if self.pick == "last" else 0]
        return super().answer((match[1] if match.re.groups else match[0]) or "")

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        return answer in {self.normal(reference) for reference in references}


def _named(value: Any) -> Any:
    """A bare word is the method: `verifier: exact`."""
    return {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value


#: The setting of a task file.
Verifier = Annotated[Exact | Contains | Numeric | Pattern, Field(discriminator="method"), BeforeValidator(_named)]
