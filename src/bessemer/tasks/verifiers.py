"""Verifiers: whether a generated text gives the right answer.

A verifier is at once its settings in a task file. `answer` finds what a text answers, in a form that can be compared and
counted. `accepts` says whether that is one of the references. Numbers are read exactly: thousands with commas, decimals,
fractions, exponents, and as LaTeX writes them.
"""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from bessemer.core.config import Config, setting
from bessemer.data.text.word_rules import ALONE

_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»…")
#: The letter A as an answer, not as an article: `A is right`, `(a)`, not `a right answer`.
_LETTER_A = {"A": re.compile(r"(?<![^\W_])A(?![^\W_])"), "a": re.compile(r"(?<![^\W_])a(?![^\W_]|\s+[^\w\s]*\w)")}


class _Verifier(Config):
    #: Name of the grade, where a text may be right in part; None: it is right or wrong.
    graded: ClassVar[str | None] = None

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

    def grade(self, text: str, references: Sequence[str]) -> float:
        """How right a text is, from 0 to 1."""
        return float(self.verify(text, references))


def checked_pattern(pattern: str) -> str:
    """The pattern itself. Raises ValueError when it is no regular expression of Python."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return pattern


def _only_articles(text: str) -> bool:
    return not _ARTICLES.sub("", text).translate(_PUNCTUATION).strip()


class _Normalising(_Verifier):
    ignore_case: bool = setting(True, "A and a are equal")
    ignore_punctuation: bool = setting(True, "leave out ASCII punctuation and typographic quotes")
    ignore_articles: bool = setting(True, "leave out a, an and the")

    def normal(self, text: str) -> str:
        """The text as it is compared. A step that would leave nothing of it is not taken: `A.` is `a`."""
        whole = self._with_articles(text)
        if not self.ignore_articles:
            return whole
        return whole if _only_articles(whole) else " ".join(_ARTICLES.sub(" ", whole).split())

    def _with_articles(self, text: str) -> str:
        plain = " ".join(text.split())
        folded = plain.casefold() if self.ignore_case else plain
        if not self.ignore_punctuation:
            return folded
        return " ".join(folded.translate(_PUNCTUATION).split()) or folded


class Exact(_Normalising):
    """The whole text is a reference, after the normalisation of SQuAD (Rajpurkar et al. 2016, section 6.1)."""

    method: Literal["exact"] = setting("exact", "the whole text is the answer")

    def answer(self, text: str) -> str | None:
        return self.normal(text) or None

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        return answer in {self.normal(reference) for reference in references}


@dataclass(frozen=True)
class _Statement:
    """A text that `contains` searches. normal: its normal form, which alone decides equality."""

    normal: str
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.normal


class Contains(_Normalising):
    """A reference stands in the text, as whole words."""

    method: Literal["contains"] = setting("contains", "the answer stands in the text, as whole words")

    def answer(self, text: str) -> _Statement | None:
        normal = self.normal(text)
        return _Statement(normal, text) if normal else None

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        assert isinstance(answer, _Statement)
        return any(self._stands_in(answer, self.normal(reference)) for reference in references)

    def _stands_in(self, statement: _Statement, reference: str) -> bool:
        """Whether a reference in its normal form stands in a text, whose articles count where the reference is one."""
        searched = statement.normal
        if self.ignore_articles and _only_articles(reference):
            if reference in _LETTER_A:
                # elsewhere in running text `a` is an article
                cases = _LETTER_A if self.ignore_case else [reference]
                return any(_LETTER_A[case].search(statement.text) for case in cases)
            searched = self._with_articles(statement.text)
        return re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", searched) is not None


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
        matches = list(re.finditer(self.pattern, text))
        if not matches:
            return None
        match = matches[-1 if self.pick == "last" else 0]
        return self.normal((match[1] if match.re.groups else match[0]) or "") or None

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        return answer in {self.normal(reference) for reference in references}


class Overlap(_Normalising):
    """A text shares enough words with a reference: the F1 of SQuAD (Rajpurkar et al. 2016, section 6.1), each word as often as
    it occurs in both. Answers are compared by the F1 itself."""

    graded: ClassVar[str | None] = "f1"
    method: Literal["overlap"] = setting(
        "overlap", "as many of the words are a right answer's: for answers of a sentence or more"
    )
    least: float = setting(0.7, "least F1 of the words of the text and of a right answer", gt=0, le=1)

    def answer(self, text: str) -> str | None:
        return self.normal(text) or None

    def accepts(self, answer: Hashable, references: Sequence[str]) -> bool:
        return any(word_f1(str(answer), self.normal(reference)) >= self.least for reference in references)

    def grade(self, text: str, references: Sequence[str]) -> float:
        return max((word_f1(self.normal(text), self.normal(reference)) for reference in references), default=0.0)


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of the shares of words that a text and a reference have in common."""
    words, wanted = Counter(_words(text)), Counter(_words(reference))
    shared = (words & wanted).total()
    return 2 * shared / (words.total() + wanted.total()) if shared else 0.0


def _words(text: str) -> list[str]:
    return ALONE.sub(r" \g<0> ", text).split()


def _named(value: Any) -> Any:
    """A bare word is the method: `verifier: exact`."""
    return {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value


#: The setting of a task file.
Verifier = Annotated[Exact | Contains | Numeric | Pattern | Overlap, Field(discriminator="method"), BeforeValidator(_named)]


_SPACE = r"[^\S\n]"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
#: A sign counts where no word or number ends before it: `10-5` is 10 and 5. With a space behind it see `_BEFORE_VALUE`.
_NUMBER = re.compile(
    rf"(?P<sign>(?:(?<![\w)\]}}])[-−–+]{_SPACE}?)?)[$€£]?"
    rf"(?:(?P<whole>{_DIGITS}){_SPACE}+(?P<mixed>\d+/0*[1-9]\d*)(?![\d/])"
    rf"|(?P<numerator>{_DIGITS}){_SPACE}?/{_SPACE}?(?P<denominator>0*[1-9]\d*)(?![\d/])"
    rf"|(?P<decimal>{_DIGITS}(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{{1,3}}(?!\w))?)"
)
_MINUS = "-−–"
#: Where `- 5` is −5: at the beginning of a text and behind these, as in `x = - 5`. Elsewhere its sign is a dash, that of
#: `10 - 5`, or a bullet.
_BEFORE_VALUE = re.compile(r"(?:[=≈≠<>≤≥→⇒:({\[$]|\b(?:is|equals))\Z")
#: Characters before a sign that are looked at.
_LOOK_BACK = 20
#: A number of more characters is no answer: Python refuses to write integers of more than 4,300 digits.
_LONGEST = 1_000
#: What marks the final answer in the data of GSM8K.
_MARK = "####"

#: `\frac{1}{2}` and `\frac12`.
_FRACTION = re.compile(
    rf"\\[dt]?frac\s*(?:{{\s*(?P<over>[-−–+]?\s?{_DIGITS})\s*}}|(?P<digit_over>\d))"
    rf"\s*(?:{{\s*(?P<under>{_DIGITS})\s*}}|(?P<digit_under>\d))"
)
#: The commas and spaces that LaTeX sets inside a number: `1{,}234`, `1,\!234`, `1\,234`.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3}(?!\d))")


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text in their order, without those of more than 1,000 characters."""
    return [number for match in _matches(text) if (number := _value(match)) is not None]


def whole_number(text: str) -> Fraction | None:
    """The number that a text is, with white space around it or a full stop behind; None when it is something else."""
    text = text.strip().removesuffix(".")
    match = _NUMBER.fullmatch(_without_latex(text).strip())
    return _value(match) if match else None


def answered_number(text: str, pick: str) -> Fraction | None:
    """The number that a text answers: the first after the last `####`, if there is one; else the `last` or the `first`.

    None without any, and where that number has more than 1,000 characters.
    """
    _, has_mark, marked = text.rpartition(_MARK)
    if has_mark and (matches := _matches(marked)):
        return _value(matches[0])
    matches = _matches(text)
    return _value(matches[-1 if pick == "last" else 0]) if matches else None


def _matches(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(_without_latex(text)))


def _without_latex(text: str) -> str:
    """The text with LaTeX's fractions, thousands and dollar signs as plain text has them."""
    return _FRACTION.sub(_plain_fraction, _THOUSANDS.sub(",", text).replace(r"\$", "$"))


def _plain_fraction(match: re.Match[str]) -> str:
    text, start, end = match.string, match.start(), match.end()
    over, under = match["over"] or match["digit_over"], match["under"] or match["digit_under"]
    # 2\frac{1}{2} is a mixed number
    before, after = (" " * side.isdecimal() for side in (text[max(start - 1, 0) : start], text[end : end + 1]))
    return f"{before}{''.join(over.split())}/{under}{after}"


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST:
        return None
    sign = -1 if _is_negative(match) else 1
    if match["mixed"]:
        return sign * (_digits(match["whole"]) + Fraction(match["mixed"]))
    if match["numerator"]:
        return sign * _digits(match["numerator"]) / int(match["denominator"])
    return sign * _digits(match["decimal"] + (match["exponent"] or ""))


def _is_negative(match: re.Match[str]) -> bool:
    sign = match["sign"]
    if not sign or sign[0] not in _MINUS:
        return False
    if len(sign) == 1:
        return True
    first = max(match.start() - _LOOK_BACK, 0)
    before = match.string[first : match.start()]
    # asterisks and underscores are Markdown's emphasis
    return _BEFORE_VALUE.search(before.rstrip(" \t*_")) is not None or (first == 0 and not before.strip())


def _digits(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
