"""How answers about pictures are scored where they are published: MMMU, ChartQA, DocVQA and POPE.

Each follows the data set's own evaluation to the letter, also where another rule would be kinder, so that figures stand beside
published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# ------------------------------------------------------------------------------------------------------- MMMU

_EDGES = (",", ".", "!", "?", ";", ":", "'")
#: An answer of more words is searched for the text of an option.
_SHORT_ANSWER = 5


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses (MMMU's `parse_multi_choice_response`); None where it names none.

    options: their texts by letter. Letters in brackets are looked for first, then those before a space, then those before a
    full stop; in an answer of more than five words at last the texts of the options. Of several the last in the answer counts.
    """
    for edge in _EDGES:
        text = text.strip(edge)
    padded = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        letters = [letter for letter in options if form.format(letter) in padded]
        if letters:
            return max(letters, key=lambda letter: padded.rfind(place.format(letter)))
    folded = padded.lower()
    if len(padded.split()) > _SHORT_ANSWER:
        letters = [letter for letter, option in options.items() if option.lower() in folded]
        if letters:
            return max(letters, key=lambda letter: folded.rfind(options[letter].lower()))
    return None


#: What stands before an answer in a line; `=` counts in the last line alone.
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def answers_right(text: str, references: Sequence[str]) -> bool:
    """Whether an answer to an open question holds a right one (MMMU's `parse_open_response` and `eval_open`): a number equal to
    two decimals, or a text that stands in it."""
    wanted = {each for reference in references for each in _normal(reference)}
    for candidate in _candidates(text):
        if isinstance(candidate, float):
            if candidate in wanted:
                return True
        elif any(isinstance(each, str) and each in candidate for each in wanted):
            return True
    return False


def _candidates(text: str) -> list[float | str]:
    """What an answer may mean: the end of each line behind a word that announces it, and the numbers in these."""
    lowered = text.strip().strip(".").lower()
    lines = lowered.split("\n")
    ends = []
    for number, line in enumerate(lines, start=1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        behind = [line.rsplit(key, 1)[1].strip() for key in keys if key in line]
        # an empty end is replaced by the next, as there
        shortest = ""
        for each in behind:
            if not shortest or len(each) < len(shortest):
                shortest = each
        if shortest and shortest not in _EDGES:
            ends.append(shortest)
    ends = ends or [lowered]
    found = [*ends, *(number for end in ends for pattern in _NUMBERS for number in pattern.findall(end))]
    return [each for one in found for each in _normal(one)]


def _normal(text: str) -> list[float | str]:
    """A number rounded to two decimals, or a text in small letters. A single letter counts with a space beside it alone."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


# ------------------------------------------------------------------------------------------------------- ChartQA


def relaxed_match(text: str, reference: str, tolerance: float = 0.05) -> bool:
    """Whether a number is within a share of the right one, or a text is the right one in any case (Masry et al. 2022, section
    5.1). A per cent is a hundredth; beside a right answer of 0, numbers are compared as texts."""
    text, reference = text.strip(), reference.strip()
    number, wanted = _number(text), _number(reference)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= tolerance
    return text.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------------- DocVQA


def anls(text: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """1 less the edit distance to the nearest right answer, as a share of the longer of both; 0 below the threshold (average
    normalised Levenshtein similarity: Biten et al. 2019, section 3.3, as DocVQA's evaluation computes it).

    Case and white space do not count in the distance, and do in the length.
    """
    text = text.strip()
    said = " ".join(text.lower().split())
    nearest = 1.0
    for reference in references:
        longest = max(len(reference.upper()), len(text.upper()))
        distance = edit_distance(" ".join(reference.strip().lower().split()), said)
        nearest = min(nearest, distance / longest if longest else 0.0)
    similarity = 1 - nearest
    return similarity if similarity >= threshold else 0.0


def edit_distance(first: str, second: str) -> int:
    """Characters to insert, remove or replace to make one text of the other (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for place, character in enumerate(first, start=1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            changed = diagonal + (character != other)
            diagonal = row[column]
            row[column] = min(changed, row[column] + 1, row[column - 1] + 1)
    return row[-1]


# ------------------------------------------------------------------------------------------------------- POPE


def says_yes(text: str) -> bool:
    """Whether an answer is a yes: one whose first sentence has no word of no (POPE's own rule)."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def detection_scores(is_yes: Sequence[bool], is_there: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Scores of the answers to one question of whether something is there, and their weights, whose means over questions are
    accuracy, precision, recall, F1 and the share of answers that are yes.

    Precision is the mean over answers of yes, recall over questions about what is there. F1 = 2 TP / (2 TP + FP + FN) is the
    mean of 1 for a right yes, which counts twice, and 0 for each false answer; a right no has no part in it.
    """
    yes = sum(is_yes)
    wrong = len(is_yes) - yes if is_there else yes
    scores = {"accuracy": 1 - wrong / len(is_yes), "yes_ratio": yes / len(is_yes)}
    weights: dict[str, int] = {}
    if yes:
        scores["precision"], weights["precision"] = float(is_there), yes
    if is_there:
        scores["recall"] = yes / len(is_yes)
    twice = 2 * yes if is_there else 0
    if twice + wrong:
        scores["f1"], weights["f1"] = twice / (twice + wrong), twice + wrong
    return scores, weights
