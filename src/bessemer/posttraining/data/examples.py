"""Examples from files, functions and earlier stages: rows read by a parser, conversations, pairs of answers.

`made/mismatched` is made here, from a run's conversations: pairs of an answer and one that belongs to another question. Every
second wrong answer looks like the right one: it answers a question that begins with the same words, so that only the rest of
the question tells them apart. The others answer a question of another kind, which is easier to notice.
"""

from __future__ import annotations

import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from bessemer.core.errors import BessemerError, RequestError, SourceError
from bessemer.core.hashing import derive_seed, hash_file, hash_value
from bessemer.core.records import BadRow, Record, split_part
from bessemer.core.store import write_text
from bessemer.core.usercode import load_user_function
from bessemer.posttraining.data.dialects import TURNS
from bessemer.posttraining.data.formats import (
    ANSWERS,
    LABELS,
    Answered,
    Message,
    Pair,
    Turns,
    answer_in_columns,
    as_answered,
    as_labelled,
    as_pair,
    as_prompt,
    plain_turns,
)
from bessemer.posttraining.data.hub import HubDataset
from bessemer.posttraining.data.made import MISMATCHED, TASK, OnBadRow, data_name, data_path, made_path
from bessemer.posttraining.data.picture_rows import (
    SUFFIXES,
    has_pictures,
    is_picture_part,
    picture_part,
    pictures_of,
    sources_in,
)
from bessemer.posttraining.data.preview import Understood, understand
from bessemer.posttraining.data.splitting import opening, split_examples
from bessemer.posttraining.data.understanding import (
    DataPlace,
    RowSet,
    conversation_parser,
    find_columns,
    open_rows,
    with_known_names,
)

Example = TypeVar("Example")

_log = logging.getLogger(__name__)


class RowReader:
    """Reads the rows that a stage learns from, keeps the bad ones, and reports how it understood the others. on_bad_row: `skip`
    leaves bad rows out, unless they are more than a twentieth of a file's; `stop` refuses them. say: prints lines about each
    file; None: left-out rows are logged as warnings. bad: the rows left out so far.
    """

    def __init__(self, on_bad_row: OnBadRow = "skip", say: Callable[[str], None] | None = None) -> None:
        self.bad: list[BadRow] = []
        self._on_bad_row: OnBadRow = on_bad_row
        self._say = say

    def examples(self, place: DataPlace, parse: Callable[[Mapping[str, Any]], Example]) -> list[tuple[str, Example]]:
        """The rows of a place as (file and line, example). Raises SourceError for bad rows that the rule refuses, and as
        `open_rows`."""
        return self.accept(understand(with_known_names(open_rows(place)), parse))

    def conversations(self, place: DataPlace, columns: tuple[str, str] | None = None) -> list[tuple[str, Answered]]:
        """Rows of a place in any format for supervised tuning. columns: those of questions and of answers; None: they are
        recognised by their names. Raises as `examples`, and SourceError where no columns are recognised."""
        rows = open_rows(place)
        return self.accept(understood_conversations(rows, columns))

    def accept(self, understood: Understood[Example]) -> list[tuple[str, Example]]:
        """The examples, after printing how the rows were understood. Raises SourceError for bad rows that the rule refuses."""
        examples = understood.checked(self._on_bad_row)
        self.bad += understood.bad
        if self._say is not None:
            for line in understood.lines():
                self._say(line)
        elif understood.bad:
            _log.warning("note: %s", understood.warning)
        return examples

    @property
    def figures(self) -> dict[str, int]:
        """For a stage's metrics: the number of rows left out, where there are any."""
        return {"bad_rows": len(self.bad)} if self.bad else {}

    def write_bad_rows(self, path: Path) -> None:
        """Write the rows that were left out, with their places and reasons; nothing where there are none."""
        if self.bad:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"place": row.place, "reason": row.why} for row in self.bad]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


#: File of the rows that a stage left out, in its folder.
BAD_ROWS = "bad_rows.jsonl"


def understood_conversations(rows: RowSet, columns: tuple[str, str] | None = None) -> Understood[Answered]:
    """Rows parsed for supervised tuning. columns: as in `RowReader.conversations`, and raises the same."""
    if columns is None:
        rows = with_known_names(rows)
        columns = find_columns(rows) if rows.records else None
    return understand(rows, conversation_parser(rows, columns), columns)


def previewed(name: str, prompt: str | None = None, answer: str | None = None) -> Understood[Any]:
    """How the data with a user's name are understood, by their columns: pairs of answers, good and bad answers, conversations,
    texts, or prompts. prompt, answer: columns of questions and of answers, if the user names them. Raises SourceError where no
    columns are recognised, and as `open_rows`.
    """
    rows = with_known_names(open_rows(data_path(data_name(name), Path(), {})))
    names = set(rows.columns)
    if prompt is None and answer is None:
        if names & {"chosen", "chosen_messages", "preferred_output"}:
            return understand(rows, partial(as_pair, pictures=True))
        if names & {*LABELS} and ("completion" in names or names & {*TURNS}):
            return understand(rows, partial(as_labelled, pictures=True))
        if "prompt" in names and not names & {"completion", *ANSWERS}:
            return understand(rows, as_prompt)
    columns = find_columns(rows, prompt, answer, ("--prompt-column", "--answer-column"), is_chat=True)
    return understood_conversations(rows, columns)


def read_examples(
    place: DataPlace, parse: Callable[[Mapping[str, Any]], Example], reader: RowReader | None = None
) -> list[Example]:
    """The rows of a place as examples. Raises as `RowReader.examples`."""
    return [example for _, example in (reader or RowReader()).examples(place, parse)]


def examples_of_function(
    name: str, folder: Path, parse: Callable[[Mapping[str, Any]], Example], reader: RowReader | None = None
) -> list[tuple[str, Example]]:
    """The rows that a user's `file.py:function` gives, as (function and number of the row, example).

    Raises ConfigError where there is no such function, SourceError for one that fails or gives none, and for bad rows that the
    reader refuses.
    """
    function = load_user_function(name, folder)
    try:
        rows = list(function())
    except BessemerError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise SourceError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise SourceError(f"{name}: row {number:,} must be a dict, it is {row!r}"[:200])
    if not rows:
        raise SourceError(f"{name}: it gives no row")
    records = [Record(dict(row), number, f"{name}: row {number:,}") for number, row in enumerate(rows, start=1)]
    return (reader or RowReader()).accept(understand(RowSet(name, "a function", records), parse))


def prompt_key(prompt: Turns) -> str:
    """Hash of a prompt, by which examples of one prompt are kept together."""
    return hash_value(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])


#: Tables of text, whose rows may name files of pictures.
_NAMING = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")


def drawn(examples: Sequence[Example], most: int, seed: int) -> Sequence[Example]:
    """At most `most` examples, drawn at random, since the first ones would all come from the first file."""
    return examples if len(examples) <= most else random.Random(seed).sample(examples, most)


def files_fingerprint(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Hashes of files and of those of folders, and the commits of data sets of the hub, for a stage's key. Raises SourceError
    for what is missing."""
    return {name: _fingerprint(name, folder) for name in names}


def data_hash(name: str) -> str:
    """Hash of the data with a user's name: for a file, of its bytes. Raises as `files_fingerprint`."""
    fingerprint = _fingerprint(data_name(name), Path())
    return fingerprint if isinstance(fingerprint, str) else hash_value(fingerprint)


def _fingerprint(name: str, folder: Path) -> Any:
    place = data_path(name, folder, {})
    if isinstance(place, HubDataset):
        return place.commit()
    file, _ = split_part(place)
    if file.is_dir():
        inner = [path for path in sorted(file.rglob("*")) if path.is_file()]
        return {path.relative_to(file).as_posix(): hash_file(path) for path in inner}
    if not file.is_file():
        raise SourceError(f"{file}: there is no such file")
    pictures = _pictures_beside(place, file)
    return {"rows": hash_file(file), "pictures": pictures} if pictures else hash_file(file)


def _pictures_beside(place: Path, file: Path) -> str:
    """Hash of the files of pictures that a table's rows name; empty where they name none."""
    if file.suffix.lower() not in _NAMING or not any(suffix.encode() in file.read_bytes().lower() for suffix in SUFFIXES):
        return ""
    hashes: dict[str, str] = {}
    for record in open_rows(place).records:
        for source in _sources_of(record.values):
            path = file.parent / source
            if source not in hashes and not source.startswith("data:") and path.is_file():
                hashes[source] = hash_file(path)
    return hash_value(sorted(hashes.items())) if hashes else ""


def _sources_of(row: Mapping[str, Any]) -> list[str]:
    """The pictures of a row that can be read; whether it is a good row is said elsewhere."""
    try:
        answered = as_answered(row)
        found = sources_in(turn for turns in (answered.prompt, answered.answer) if not isinstance(turns, str) for turn in turns)
    except (ValueError, RequestError):
        # a pair, or a prompt
        found = list(_sources_within(list(row.values())))
    try:
        return [*found, *pictures_of(row)]
    except ValueError:
        return found


def _sources_within(value: Any) -> Iterator[str]:
    """The pictures in parts of messages, wherever they stand in a value."""
    if is_picture_part(value):
        try:
            part = picture_part(value, "picture")
        except ValueError:
            return
        yield from [part["image"]] if "image" in part else []
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _sources_within(inner)


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from, and its source: a file or the name of made data. place: its row, for messages. folder:
    where the paths of its pictures begin."""

    answered: Answered
    source: str
    place: str = field(default="", compare=False)
    folder: Path | None = field(default=None, compare=False)

    @classmethod
    def of(cls, messages: Sequence[Message], source: str, tools: Sequence[Message] = ()) -> Self:
        """A conversation in which every turn of the assistant is learnt."""
        return cls(Answered((), tuple(messages), tuple(tools)), source)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages in order; none of a text without roles."""
        prompt, answer = self.answered.prompt, self.answered.answer
        return () if isinstance(prompt, str) or isinstance(answer, str) else (*prompt, *answer)

    @property
    def is_document(self) -> bool:
        """Whether it is a plain text, which is learnt whole."""
        return self.answered.prompt == "" and isinstance(self.answered.answer, str)

    @property
    def tools(self) -> tuple[Message, ...]:
        """The tools that the assistant could call."""
        return self.answered.tools

    @property
    def id(self) -> str:
        """Hash of the messages and the tools."""
        said = self._said
        parts = list(said.values())
        if self.tools or len(said) > 1:
            return hash_value([*parts, *([list(self.tools)] if self.tools else [])])
        return hash_value(parts[0])

    @property
    def record(self) -> dict[str, Any]:
        """The conversation as a line of a file, in the format of TRL and `datasets`."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {"id": self.id, "source": self.source, **self._said, **tools}

    @property
    def _said(self) -> dict[str, Any]:
        if self.answered.prompt == ():
            return {"messages": plain_turns(self.answered.answer)}
        return {"prompt": plain_turns(self.answered.prompt), "completion": plain_turns(self.answered.answer)}


def read_conversations(
    place: DataPlace, columns: tuple[str, str] | None = None, reader: RowReader | None = None
) -> list[Conversation]:
    """All examples of a place, in any of the formats of `formats.py`.

    columns: those of questions and of answers, for a table of other names. Raises as `RowReader.conversations`.
    """
    source = place.name if isinstance(place, Path) else str(place)
    examples = (reader or RowReader()).conversations(place, columns)
    folder = folder_of(place)
    return [Conversation(answered, source, where, folder) for where, answered in examples]


def folder_of(place: DataPlace) -> Path | None:
    """Where the paths of a place's pictures begin; None where its rows hold them."""
    if isinstance(place, HubDataset):
        return None
    return place if place.is_dir() else split_part(place)[0].parent


def made_conversations(
    name: str, folder: Path, columns: tuple[str, str] | None = None, reader: RowReader | None = None
) -> list[Conversation]:
    """All examples that a user's `file.py:function` gives, in the formats of `read_conversations`. Raises ConfigError where
    there is no such function, SourceError as `read_conversations`."""
    parse = as_answered if columns is None else partial(answer_in_columns, columns=columns)
    return [
        Conversation(answered, name, where, folder) for where, answered in examples_of_function(name, folder, parse, reader)
    ]


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write a file of conversations atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(one.record, ensure_ascii=False) + "\n" for one in conversations))


#: Number of first words that are the kind of a question.
_WORDS_OF_KIND = 2


def mismatched_pairs(conversations: Path, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs from the conversations that `sft` trained on and held out. Each question and answer gets
    another question's answer, where one is found: alternately of the same kind of question and of another kind.

    Items of tasks are left out: a verifier judges these. Raises SourceError or ArtefactError for a file that is missing or
    malformed.
    """
    training, held_out = (conversations / f"{name}.jsonl" for name in ("train", "validation"))
    return _pairs(training, seed), _pairs(held_out, seed) if held_out.stat().st_size else []


def _pairs(path: Path, seed: int) -> list[Pair]:
    by_kind: dict[tuple[str, ...], list[Conversation]] = defaultdict(list)
    for conversation in read_examples(path, _conversation):
        messages = conversation.messages
        if len(messages) == 2 and not conversation.source.startswith(TASK) and not has_pictures(messages):
            by_kind[tuple(str(messages[0]["content"]).split()[:_WORDS_OF_KIND])].append(conversation)
    pairs = []
    for kind, alike in by_kind.items():
        generator = random.Random(derive_seed(seed, "mismatched"))
        generator.shuffle(alike)
        unlike = [one for other, of_other in by_kind.items() if other != kind for one in of_other]
        for number, (conversation, next_one) in enumerate(zip(alike, [*alike[1:], alike[0]], strict=True)):
            other = generator.choice(unlike) if unlike and number % 2 else next_one
            prompt, chosen, rejected = conversation.messages[:1], conversation.messages[1:], other.messages[1:]
            # one question may have several right answers
            if chosen != rejected and other.messages[:1] != prompt:
                pairs.append(Pair(prompt, chosen, rejected))
    return pairs


def _conversation(row: Mapping[str, Any]) -> Conversation:
    return Conversation(as_answered(row), str(row.get("source", "")))


def gather_pairs(
    names: Sequence[str],
    folder: Path,
    made: Mapping[str, Path],
    share: float,
    seed: int,
    reader: RowReader | None = None,
    *,
    pictures: bool = False,
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs of all data that are named: of rows, `share` of the prompts are held out; of `made/mismatched`
    what the conversations were.

    made: what stages above have made, by name. pictures: whether prompts may have them. Raises SourceError or ArtefactError for
    pairs that are missing or malformed.
    """
    mismatched: tuple[list[Pair], list[Pair]] = ([], [])
    if MISMATCHED in names:
        mismatched = mismatched_pairs(made_path(MISMATCHED, made), seed)
    others = (data_path(name, folder, made) for name in names if name != MISMATCHED)
    parse = partial(as_pair, pictures=pictures)
    rows = [replace(pair, folder=folder_of(place)) for place in others for pair in read_examples(place, parse, reader)]
    training, held_out = split_examples(rows, lambda pair: opening(pair.prompt), share, seed)
    return [*mismatched[0], *training], [*mismatched[1], *held_out]
