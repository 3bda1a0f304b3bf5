"""Answers sampled from a model, people's rankings of them, and the pairs that follow.

A folder of labels holds `answers.jsonl`, what was sampled; `rankings.jsonl`, a line for each judgement, of which the last
one of a prompt counts; and `pairs.jsonl`, which the stages `reward` and `preference` read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress
from bessemer.core.store import write_text
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.posttraining.data.dialects import TURNS
from bessemer.posttraining.data.encoding import encode_prompt
from bessemer.posttraining.data.examples import prompt_key, read_examples
from bessemer.posttraining.data.formats import Message, messages_of

ANSWERS, RANKINGS, PAIRS = "answers.jsonl", "rankings.jsonl", "pairs.jsonl"


@dataclass(frozen=True)
class Answers:
    """Different answers to a prompt. id: hash of the prompt's messages."""

    id: str
    messages: Sequence[Message]
    answers: Sequence[str]


@dataclass(frozen=True)
class Ranking:
    """Ranks of the answers to a prompt, 1 the best; equal ranks are ties. Empty: skipped."""

    id: str
    ranks: Sequence[int]


def ranked_pairs(answers: Answers, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each pair of answers with different ranks, up to k (k − 1) / 2 for k answers; their weights sum to 1, so that
    each prompt counts once (Ouyang et al. 2022, section 3.5)."""
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
        """Prompts with their answers that nobody has judged yet."""
        return [one for id, one in self.answers.items() if id not in self.rankings]

    def rank(self, id: str, ranks: Sequence[int]) -> None:
        """Record a judgement; no ranks: the prompt is skipped. Raises ValueError unless there is one rank for each answer."""
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
    """The lines of a file; empty if there is no file. A last line that a crash cut off is removed from the file."""
    if not path.exists():
        return []
    labels = []
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
        labels.append(values)
    return labels


#: Prompts of one engine call; an interruption loses the answers of one call.
_PROMPTS_AT_ONCE = 8
#: Most calls for a prompt whose answers are too similar.
_TRIES = 3


def read_prompts(path: Path, count: int) -> list[tuple[Message, ...]]:
    """The first prompts of a file: under `prompt` messages or a text, or the turns of `messages` before the last answer.

    Raises SourceError with the line of the first that is malformed.
    """
    return read_examples(path, _prompt)[:count]


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    given = next((row[name] for name in ("prompt", *TURNS) if name in row), None)
    if isinstance(given, str) and given.strip():
        given = [{"role": "user", "content": given}]
    if not given or isinstance(given, str):
        raise ValueError(f"needs messages or a text under 'prompt'; it has {', '.join(map(repr, row)) or 'nothing'}"[:200])
    messages = messages_of(given, "prompt")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("nothing is asked before the assistant's turn")
    return tuple(messages)


def sample_answers(
    engine: Engine,
    prompts: Sequence[Sequence[Message]],
    out: Path,
    *,
    count: int,
    params: SamplingParams,
    seed: int,
    progress: Progress,
) -> Labels:
    """`count` different answers to each prompt, kept in `out`; existing ones are not sampled again.

    Answers cut at the most tokens are not used. A prompt may get fewer answers if the model repeats itself; with a single one
    there is nothing to rank, and it is left out. Raises RequestError for a prompt that is too long.
    """
    out.mkdir(parents=True, exist_ok=True)
    labels = Labels(out)
    by_id = {prompt_key(tuple(messages)): messages for messages in prompts}
    left = [(id, messages) for id, messages in by_id.items() if id not in labels.answers]
    left_out = 0
    with (
        (out / ANSWERS).open("a", encoding="utf-8") as stream,
        progress.task("answers", total=len(left), unit="prompts") as bar,
    ):
        for start in range(0, len(left), _PROMPTS_AT_ONCE):
            some = left[start : start + _PROMPTS_AT_ONCE]
            for (id, messages), texts in zip(some, _different(engine, some, count, params, seed), strict=True):
                if len(texts) > 1:
                    stream.write(json.dumps(asdict(Answers(id, list(messages), texts)), ensure_ascii=False) + "\n")
                left_out += len(texts) < 2
            stream.flush()
            bar.advance(len(some))
    if left_out:
        progress.say(
            f"  {left_out:,} prompts are left out: fewer than two of the model's answers differ and end within max_tokens; "
            "raise --temperature or --max-tokens"
        )
    return Labels(out)


def _different(
    engine: Engine, conversations: Sequence[tuple[str, Sequence[Message]]], count: int, params: SamplingParams, seed: int
) -> list[list[str]]:
    """Up to `count` different, complete answers to each of the prompts."""
    answers: list[dict[str, None]] = [{} for _ in conversations]
    for trial in range(_TRIES):
        short = [place for place, texts in enumerate(answers) if len(texts) < count]
        if not short:
            break
        calls = [
            params.with_changes(seed=derive_seed(seed, "label", conversations[place][0], trial, number) % 2**31)
            for place in short
            for number in range(count)
        ]
        prompts = [encode_prompt(tuple(conversations[place][1]), engine.tokenizer) for place in short for _ in range(count)]
        for number, completion in enumerate(engine.generate(prompts, calls)):
            texts, text = answers[short[number // count]], completion.text.strip()
            if completion.finish_reason != "length" and text and len(texts) < count:
                texts[text] = None
    return [list(texts) for texts in answers]
