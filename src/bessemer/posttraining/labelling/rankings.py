"""Rankings of answers, and the pairs that follow from them.

A folder of labels holds `answers.jsonl`, what was sampled; `rankings.jsonl`, a line for each judgement, of which the last one
of a prompt counts; and `pairs.jsonl`, which the stages `reward` and `preference` read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.store import write_text
from bessemer.posttraining.formats import Message

ANSWERS, RANKINGS, PAIRS = "answers.jsonl", "rankings.jsonl", "pairs.jsonl"


@dataclass(frozen=True)
class Answers:
    """Different answers to a prompt. id: hash of the prompt's messages."""

    id: str
    messages: Sequence[Message]
    answers: Sequence[str]


@dataclass(frozen=True)
class Ranking:
    """What somebody said of the answers to a prompt: the rank of each, 1 the best, equal ones as good. Empty: skipped."""

    id: str
    ranks: Sequence[int]


def ranked_pairs(answers: Answers, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each two answers of which one is better, up to k (k − 1) / 2 of k answers; their weights sum to 1, so that a
    prompt counts once however many answers it has (Ouyang et al. 2022, section 3.5)."""
    preferred = [
        (first, second) if ranks[first] < ranks[second] else (second, first)
        for first, second in combinations(range(len(ranks)), 2)
        if ranks[first] != ranks[second]
    ]
    return [
        {
            "prompt": list(answers.messages),
            "chosen": [{"role": "assistant", "content": answers.answers[better]}],
            "rejected": [{"role": "assistant", "content": answers.answers[worse]}],
            "weight": 1 / len(preferred),
        }
        for better, worse in preferred
    ]


class Labels:
    """The labels of a folder; every judgement is on disk when `rank` returns."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtefactError for files that are damaged."""
        self._folder = folder
        self.answers = {
            one.id: one for one in (Answers(**values) for values in _lines(folder / ANSWERS, {"id", "messages", "answers"}))
        }
        self.rankings = {one.id: one for one in (Ranking(**values) for values in _lines(folder / RANKINGS, {"id", "ranks"}))}

    @property
    def left(self) -> list[Answers]:
        """Answers that nobody has judged."""
        return [one for id, one in self.answers.items() if id not in self.rankings]

    def rank(self, id: str, ranks: Sequence[int]) -> None:
        """Keep a judgement; none: the prompt is skipped. Raises ValueError for ranks that are not one for each answer."""
        expected = len(self.answers[id].answers)
        if ranks and (len(ranks) != expected or min(ranks) < 1 or max(ranks) > expected):
            raise ValueError(f"{expected} answers need as many ranks from 1 to {expected}, not {list(ranks)}")
        ranking = Ranking(id, list(ranks))
        with (self._folder / RANKINGS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(ranking)) + "\n")
        self.rankings[id] = ranking
        self._write_pairs()

    def _write_pairs(self) -> None:
        rows = [
            row
            for id, ranking in self.rankings.items()
            if ranking.ranks and id in self.answers
            for row in ranked_pairs(self.answers[id], ranking.ranks)
        ]
        write_text(self._folder / PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _lines(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The lines of a file; none without the file. What a crash left of a last one is taken out, for the next to be whole."""
    if not path.exists():
        return []
    found = []
    *lines, cut = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if cut:
        write_text(path, "".join(f"{line}\n" for line in lines))
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict) or set(values) != keys:
            raise ArtefactError(f"{path}:{number}: not a line of labels; it needs {', '.join(sorted(keys))}")
        found.append(values)
    return found
