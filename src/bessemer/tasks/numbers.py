"""Numbers in texts, exactly: thousands with commas, decimals, fractions, exponents, and as LaTeX writes them."""

from __future__ import annotations

import re
from fractions import Fraction

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
    """The number that answers: of what follows the last `####` if there is one; the `last` or the `first`.

    None without any, and where that number has more than 1,000 characters.
    """
    _, has_mark, marked = text.rpartition(_MARK)
    if has_mark and (found := _matches(marked)):
        return _value(found[0])
    found = _matches(text)
    return _value(found[-1 if pick == "last" else 0]) if found else None


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
