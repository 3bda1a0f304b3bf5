"""Constraints on the form of an answer that a program can check, as in IFEval (Zhou et al. 2023).

A constraint is at once its settings in a task's data (`{kind: words, at_most: 50}`), the sentence that asks for it, and its
check.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NoReturn, Self

from pydantic import Field, model_validator

from bessemer.core.config import Config, setting

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
#: A full stop ends a sentence where white space and no small letter follow: not in `e.g. this`.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*(?=\s+[^\sa-z]|\s*$)|[。！？]+[」』”）]*")
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_BULLET = re.compile(r"^[^\S\n]*[-*+•][^\S\n]+\S", re.MULTILINE)
#: The number before an item of a list.
_NUMBERED = re.compile(r"^[^\S\n]*\d+[.)][^\S\n]+(?=\S)", re.MULTILINE)
#: `[name]`, not `[text](address)` and not the box `[x]` of a list.
_PLACEHOLDER = re.compile(r"\[(?![ xX]\])([^\[\]\n]*)\](?!\()")
_HIGHLIGHT = re.compile(r"(?<![*\w])(\*{1,2})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?![*\w])")
_TITLE = re.compile(r"<<([^<>\n]*)>>")
_FENCE = re.compile(r"```(?:json)?[^\S\n]*\n(.*)\n[^\S\n]*```", re.DOTALL | re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»"}


class _Constraint(Config):
    #: The sentence that asks for it, with settings in braces; lists are joined by commas.
    request: ClassVar[str]

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        settings = {name: ", ".join(value) if isinstance(value, list) else value for name, value in self.model_dump().items()}
        return self.request.format_map(settings)

    @abstractmethod
    def holds(self, answer: str) -> bool:
        """Whether an answer keeps to it."""


class _Counted(_Constraint):
    """The least and the largest number of something; both equal: exactly that number."""

    #: What is counted, as the instruction calls it; settings in braces.
    counted: ClassVar[str]
    #: What finds the things that are counted; None where a class counts otherwise.
    pattern: ClassVar[re.Pattern[str] | None] = None

    at_least: int | None = setting(None, "the fewest", ge=0)
    at_most: int | None = setting(None, "the most", ge=0)

    @model_validator(mode="after")
    def _limited(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("at_least or at_most must be given")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is more than at_most {self.at_most}")
        return self

    def count(self, answer: str) -> int:
        """How many an answer has."""
        assert self.pattern is not None
        return len(self.pattern.findall(answer))

    @property
    def instruction(self) -> str:
        low, high = self.at_least, self.at_most
        if low == high:
            amount = f"exactly {low}"
        elif low is None or high is None:
            amount = f"at most {high}" if low is None else f"at least {low}"
        else:
            amount = f"from {low} to {high}"
        return f"Your answer must have {amount} {self.counted.format_map(self.model_dump())}."

    def holds(self, answer: str) -> bool:
        count = self.count(answer)
        return (self.at_least is None or count >= self.at_least) and (self.at_most is None or count <= self.at_most)


class Words(_Counted):
    """How many words; `don't` and `well-known` are one."""

    kind: Literal["words"] = setting("words", "number of words")
    counted: ClassVar[str] = "words"
    pattern: ClassVar[re.Pattern[str] | None] = _WORD


class Characters(_Counted):
    """How many characters, white space at the ends aside."""

    kind: Literal["characters"] = setting("characters", "number of characters")
    counted: ClassVar[str] = "characters"

    def count(self, answer: str) -> int:
        return len(answer.strip())


class Sentences(_Counted):
    """How many sentences; what stands behind the last full stop is one, the number of a list's item is none."""

    kind: Literal["sentences"] = setting("sentences", "number of sentences")
    counted: ClassVar[str] = "sentences"

    def count(self, answer: str) -> int:
        return sum(bool(_WORD.search(sentence)) for sentence in _SENTENCE_END.split(_NUMBERED.sub("", answer)))


class Paragraphs(_Counted):
    """How many paragraphs, empty lines between them; a line of signs is none."""

    kind: Literal["paragraphs"] = setting("paragraphs", "number of paragraphs")
    counted: ClassVar[str] = "paragraphs, with an empty line between them"

    def count(self, answer: str) -> int:
        return sum(bool(_WORD.search(paragraph)) for paragraph in _PARAGRAPH_END.split(answer))


class Bullets(_Counted):
    """How many bullet points: lines that begin with `-`, `*`, `+` or `•` and a space."""

    kind: Literal["bullets"] = setting("bullets", "number of bullet points")
    counted: ClassVar[str] = "bullet points, lines that begin with `- `"
    pattern: ClassVar[re.Pattern[str] | None] = _BULLET


class NumberedItems(_Counted):
    """How many items of a numbered list: lines that begin with `1.` or `1)` and a space."""

    kind: Literal["numbered_items"] = setting("numbered_items", "number of items in numbered lists")
    counted: ClassVar[str] = "items in a numbered list, lines that begin with `1. `, `2. ` and so on"
    pattern: ClassVar[re.Pattern[str] | None] = _NUMBERED


class Placeholders(_Counted):
    """How many placeholders in square brackets; links and ticked boxes are none."""

    kind: Literal["placeholders"] = setting("placeholders", "number of placeholders")
    counted: ClassVar[str] = "placeholders in square brackets, such as [address]"

    def count(self, answer: str) -> int:
        return sum(bool(_WORD.search(name)) for name in _PLACEHOLDER.findall(answer))


class Highlights(_Counted):
    """How many parts between single or double asterisks."""

    kind: Literal["highlights"] = setting("highlights", "number of highlighted parts")
    counted: ClassVar[str] = "parts highlighted in Markdown, *like this*"
    pattern: ClassVar[re.Pattern[str] | None] = _HIGHLIGHT


class WordFrequency(_Counted):
    """How often a word or phrase stands in the answer, in any case."""

    kind: Literal["word_frequency"] = setting("word_frequency", "number of times that a word is used")
    word: str = setting(description="the word, or a phrase", min_length=1)
    counted: ClassVar[str] = "occurrences of the word “{word}”"

    def count(self, answer: str) -> int:
        return len(_occurrences(self.word, answer))


class LetterFrequency(_Counted):
    """How often a letter stands in the answer, in any case."""

    kind: Literal["letter_frequency"] = setting("letter_frequency", "number of times that a letter is used")
    letter: str = setting(description="the letter", min_length=1, max_length=1)
    counted: ClassVar[str] = "times the letter “{letter}”"

    def count(self, answer: str) -> int:
        return answer.casefold().count(self.letter.casefold())


class RequiredWords(_Constraint):
    """Each of some words or phrases stands in the answer, in any case."""

    kind: Literal["required_words"] = setting("required_words", "words that must be used")
    request: ClassVar[str] = "Your answer must have these words in it: {words}."
    words: list[str] = setting(description="words or phrases", min_length=1)

    def holds(self, answer: str) -> bool:
        return all(_occurrences(word, answer) for word in self.words)


class ForbiddenWords(_Constraint):
    """None of some words or phrases stands in the answer, in any case; in a longer word it may."""

    kind: Literal["forbidden_words"] = setting("forbidden_words", "words that must not be used")
    request: ClassVar[str] = "Your answer must not have any of these words in it: {words}."
    words: list[str] = setting(description="words or phrases", min_length=1)

    def holds(self, answer: str) -> bool:
        return not any(_occurrences(word, answer) for word in self.words)


class StartsWith(_Constraint):
    """The answer begins with a text, in any case, quotes before it aside."""

    kind: Literal["starts_with"] = setting("starts_with", "what the answer begins with")
    request: ClassVar[str] = "Begin your answer with exactly these words: {text}"
    text: str = setting(description="the first words", min_length=1)

    def holds(self, answer: str) -> bool:
        return _bare(answer).startswith(_bare(self.text))


class EndsWith(_Constraint):
    """The answer ends with a text, in any case, and nothing comes after it but quotes."""

    kind: Literal["ends_with"] = setting("ends_with", "what the answer ends with")
    request: ClassVar[str] = "End your answer with exactly these words, and nothing after them: {text}"
    text: str = setting(description="the last words", min_length=1)

    def holds(self, answer: str) -> bool:
        return _bare(answer).endswith(_bare(self.text))


class Json(_Constraint):
    """The whole answer is one JSON value, perhaps in a fence of Markdown; with keys an object that has them."""

    kind: Literal["json"] = setting("json", "the answer is JSON")
    keys: list[str] = setting(default_factory=list, description="keys that the object has")

    @property
    def instruction(self) -> str:
        keys = f", an object with the keys {', '.join(self.keys)}" if self.keys else ""
        return f"Your whole answer must be JSON{keys}."

    def holds(self, answer: str) -> bool:
        fenced = _FENCE.fullmatch(answer.strip())
        try:
            value = json.loads(fenced[1].strip() if fenced else answer, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and all(key in value for key in self.keys))


class NoCommas(_Constraint):
    """No comma in the answer, the full-width one included."""

    kind: Literal["no_commas"] = setting("no_commas", "no comma is used")
    request: ClassVar[str] = "Do not use any commas."

    def holds(self, answer: str) -> bool:
        return not set(answer) & set(",，")


class UpperCase(_Constraint):
    """No small letter in the answer, and a capital."""

    kind: Literal["upper_case"] = setting("upper_case", "capital letters only")
    request: ClassVar[str] = "Write your whole answer in capital letters."

    def holds(self, answer: str) -> bool:
        return answer.isupper()


class LowerCase(_Constraint):
    """No capital in the answer, and a small letter."""

    kind: Literal["lower_case"] = setting("lower_case", "small letters only")
    request: ClassVar[str] = "Write your whole answer in small letters, without any capitals."

    def holds(self, answer: str) -> bool:
        return answer.islower()


class Title(_Constraint):
    """A title in double angular brackets stands in the answer."""

    kind: Literal["title"] = setting("title", "a title in double angular brackets")
    request: ClassVar[str] = "Give your answer a title in double angular brackets, such as <<poem of joy>>."

    def holds(self, answer: str) -> bool:
        return any(_WORD.search(title) for title in _TITLE.findall(answer))


class Quoted(_Constraint):
    """The whole answer stands between double quotation marks."""

    kind: Literal["quoted"] = setting("quoted", "the answer stands in double quotation marks")
    request: ClassVar[str] = "Put your whole answer in double quotation marks."

    def holds(self, answer: str) -> bool:
        answer = answer.strip()
        return len(answer) > 2 and answer[-1] == _QUOTES.get(answer[0])


class OneOf(_Constraint):
    """The answer is one of some texts, in any case, quotes and a full stop aside."""

    kind: Literal["one_of"] = setting("one_of", "the answer is one of some texts")
    options: list[str] = setting(description="the texts", min_length=1)

    @property
    def instruction(self) -> str:
        return f"Answer with one of these, and nothing else: {'; '.join(self.options)}."

    def holds(self, answer: str) -> bool:
        return _bare(answer).rstrip(".") in {_bare(option).rstrip(".") for option in self.options}


#: The setting of a task's data.
Constraint = Annotated[
    Words
    | Characters
    | Sentences
    | Paragraphs
    | Bullets
    | NumberedItems
    | Placeholders
    | Highlights
    | WordFrequency
    | LetterFrequency
    | RequiredWords
    | ForbiddenWords
    | StartsWith
    | EndsWith
    | Json
    | NoCommas
    | UpperCase
    | LowerCase
    | Title
    | Quoted
    | OneOf,
    Field(discriminator="kind"),
]


class Constraints(Config):
    """The constraints on one answer."""

    shorthand: ClassVar[str | None] = "constraints"

    constraints: list[Constraint] = setting(description="what the answer must keep to", min_length=1)

    @property
    def instructions(self) -> str:
        """The sentences that ask for them, to be put behind a request."""
        return " ".join(constraint.instruction for constraint in self.constraints)

    def follows(self, answer: str, *, loose: bool = False) -> list[bool]:
        """Whether an answer keeps to each; an empty answer keeps to none.

        IFEval's accuracy by instruction is the mean over all constraints of a set; by prompt, the share of answers that keep to
        all of theirs. loose: an answer also counts without asterisks, and without its first line, its last, or both, where
        models write "Here it is:".
        """
        answers = _variants(answer) if loose else [answer]
        return [
            any(bool(variant.strip()) and constraint.holds(variant) for variant in answers) for constraint in self.constraints
        ]


def _variants(answer: str) -> Sequence[str]:
    lines = answer.strip().split("\n")
    whole = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*whole, *(text.replace("*", "") for text in whole)]


def _occurrences(word: str, text: str) -> list[str]:
    return re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE)


def _bare(text: str) -> str:
    return text.strip().strip("\"'“”‘’").strip().casefold()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
