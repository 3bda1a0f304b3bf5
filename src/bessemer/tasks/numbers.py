"""Numbers in texts, exactly: thousands with commas, decimals, fractions, exponents."""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
#: A minus sign counts where no word or number ends before it: `10-5` is 10 and 5.
_SIGN = r"(?:(?<![\w)\]])[-−+]\s?)?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})[$€£]?"
    rf"(?:(?P<whole>{_DIGITS})\s+(?P<mixed>\d+/0*[1-9]\d*)(?![\d/])"
    rf"|(?P<numerator>{_DIGITS})\s?/\s?(?P<denominator>0*[1-9]\d*)(?![\d/])"
    rf"|(?P<decimal>{_DIGITS}(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{{1,3}}(?!\w))?)"
)
#: What marks the final answer in the data of GSM8K.
_MARK = "####"


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text in their order."""
    return [_value(match) for match in _NUMBER.finditer(text)]


def whole_number(text: str) -> Fraction | None:
    """The number that a text is, with white space around it or a full stop behind; None when it is something else."""
    text = text.strip().removesuffix(".")
    match = _NUMBER.fullmatch(text)
    return _value(match) if match else None


def answered_number(text: str, pick: str) -> Fraction | None:
    """The number that answers: of what follows the last `####` if there is one; the `last` or the `first`; None without any."""
    _, has_mark, marked = text.rpartition(_MARK)
    if has_mark and (found := numbers_in(marked)):
        return found[0]
    found = numbers_in(text)
    return found[-1 if pick == "last" else 0] if found else None


def _value(match: re.Match[str]) -> Fraction:
    sign = -1 if match["sign"].strip() in ("-", "−") else 1
    if match["mixed"]:
        return sign * (_digits(match["whole"]) + Fraction(match["mixed"]))
    if match["numerator"]:
        return sign * _digits(match["numerator"]) / int(match["denominator"])
    return sign * _digits(match["decimal"] + (match["exponent"] or ""))


def _digits(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
