"""How rows were understood, in lines for a terminal: their form, the roles of columns, bad rows, two examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from bessemer.core.errors import RequestError, SourceError
from bessemer.core.records import BadRow
from bessemer.posttraining.data.dialects import TURNS
from bessemer.posttraining.data.formats import ANSWERS, LABELS, SYSTEMS, Answered, Labelled, Message, Pair, Turns, is_plain_text
from bessemer.posttraining.data.made import OnBadRow
from bessemer.posttraining.data.picture_rows import COLUMNS as PICTURES
from bessemer.posttraining.data.picture_rows import sources_in, text_of
from bessemer.posttraining.data.understanding import Parse, RowSet

Example = TypeVar("Example")

#: Largest share of bad rows in a file that are left out; more stop the run.
MOST_BAD = 1 / 20
#: Most reasons for bad rows that are shown, and most rows named for each.
_REASONS, _NAMED_ROWS = 3, 5
#: Most examples that are shown, messages of each, and characters of a message.
_EXAMPLES, _MESSAGES, _SHOWN = 2, 6, 100


@dataclass(frozen=True)
class Understood(Generic[Example]):
    """Rows and their examples. examples: (place, example). bad: rows that give no example, in order. columns: those of
    questions and of answers, where two columns hold them.
    """

    rows: RowSet
    examples: Sequence[tuple[str, Example]]
    bad: Sequence[BadRow]
    columns: tuple[str, str] | None = None

    @property
    def count(self) -> int:
        """Number of rows, bad ones included."""
        return len(self.examples) + len(self.bad)

    def checked(self, on_bad_row: OnBadRow) -> list[tuple[str, Example]]:
        """The examples. Raises SourceError for bad rows if `on_bad_row` is stop, and if more than a twentieth are bad."""
        if self.bad and on_bad_row == "stop":
            raise SourceError(
                f"{'; '.join(_reasons(self.bad))}; mend {_them(self.bad)}, or leave bad rows out with on_bad_row: skip"
            )
        if len(self.bad) > MOST_BAD * self.count:
            share = f"{len(self.bad):,} of {self.count:,} rows cannot be used, more than a twentieth"
            raise SourceError(
                f"{'; '.join(_reasons(self.bad))}; {share}; mend {_them(self.bad)}, or take {_them(self.bad)} out"
            )
        return list(self.examples)

    def lines(self) -> list[str]:
        """How the rows were understood, for a terminal."""
        form, roles = form_of(self.rows, self.columns)
        notes = "".join(f"; {note}" for note in self.rows.notes)
        lines = [
            f"{_relative(self.rows.name)}: {self.rows.kind}{notes}",
            f"  {self.count:,} {'row' if self.count == 1 else 'rows'}: {form}",
        ]
        lines += [f"  {name!r} is {role}" for name, role in roles.items()]
        unused = [name for name in self.rows.columns if name not in roles]
        if unused:
            lines.append(f"  not used: {', '.join(map(repr, unused))}")
        lines += self.bad_lines()
        for place, example in self.examples[:_EXAMPLES]:
            lines += [f"  {self._within(place)}:", *(f"    {line}" for line in shown(example))]
        return lines

    def bad_lines(self) -> list[str]:
        """The rows that are left out, with their reasons; empty where there are none."""
        if not self.bad:
            return []
        return [f"  {self._left_out}:", *(f"    {reason}" for reason in _reasons(self._places_within()))]

    @property
    def warning(self) -> str:
        """The rows that are left out, with their reasons, in one line."""
        return f"{_relative(self.rows.name)}: {self._left_out}: {'; '.join(_reasons(self._places_within()))}"

    @property
    def _left_out(self) -> str:
        are = "is" if len(self.bad) == 1 else "are"
        return f"{len(self.bad):,} of {self.count:,} rows cannot be used and {are} left out"

    def _places_within(self) -> list[BadRow]:
        return [row._replace(place=self._within(row.place)) for row in self.bad]

    def _within(self, place: str) -> str:
        """A place without the name of the rows: `line 7`, `row 3`, or a file with its line."""
        rest = place.removeprefix(self.rows.name)
        if rest == place:
            return place.rpartition("/")[2]
        if rest.startswith(":"):
            rest = rest.removeprefix(":").strip()
            return f"line {rest}" if rest.isdecimal() else rest
        return rest.lstrip(", /")


def understand(rows: RowSet, parse: Parse[Example], columns: tuple[str, str] | None = None) -> Understood[Example]:
    """Rows, parsed to examples with their places; for rows that cannot be used, the reasons."""
    examples: list[tuple[str, Example]] = []
    bad = list(rows.bad)
    for record in rows.records:
        try:
            examples.append((record.place, parse(record.values)))
        except (ValueError, RecursionError, RequestError) as error:
            bad.append(BadRow(record.number, record.place, str(error)))
    # in the order of the file, among rows that could not be read at all
    return Understood(rows, examples, sorted(bad, key=_file_and_number), columns)


def _file_and_number(row: BadRow) -> tuple[str, int]:
    return row.place.removesuffix(f":{row.number}").removesuffix(f", row {row.number}"), row.number


def _relative(name: str) -> str:
    """A path relative to the working directory, if it lies below."""
    path = Path(name)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) and path != here else name


def _them(bad: Sequence[BadRow]) -> str:
    return "it" if len(bad) == 1 else "them"


def _reasons(bad: Sequence[BadRow]) -> list[str]:
    """The first reasons, each with its first row and the places of some others."""
    by_reason: dict[str, list[BadRow]] = defaultdict(list)
    for row in bad:
        by_reason[row.why].append(row)
    lines = []
    for why, (first, *others) in list(by_reason.items())[:_REASONS]:
        kind = "line" if first.place.endswith((f":{first.number}", f"line {first.number}")) else "row"
        numbers = ", ".join(f"{row.number:,}" for row in others[:_NAMED_ROWS])
        more = ", …" if len(others) > _NAMED_ROWS else ""
        alike = f" (and {len(others):,} more: {kind}{'s' if len(others) > 1 else ''} {numbers}{more})" if others else ""
        lines.append(f"{first.place}: {why}{alike}")
    if len(by_reason) > _REASONS:
        rest = sum(len(rows) for rows in list(by_reason.values())[_REASONS:])
        lines.append(f"{rest:,} more for other reasons")
    return lines


# ------------------------------------------------------------------------------------------------ form


def form_of(rows: RowSet, columns: tuple[str, str] | None = None) -> tuple[str, dict[str, str]]:
    """What rows are, in words, and column → its role. columns: of questions and of answers, where two columns hold them."""
    names = rows.columns
    form, roles = _form(names, next((record.values for record in rows.records), {}), columns)
    beside = {
        **dict.fromkeys(("tools", "functions"), "the tools that may be called"),
        **dict.fromkeys(SYSTEMS, "the system message"),
        **dict.fromkeys(LABELS, "whether the answer is good"),
        "history": "earlier questions and answers",
        **dict.fromkeys(PICTURES, "the picture"),
    }
    known = beside if "text" not in roles else {}
    return form, roles | {name: known[name] for name in names if name in known and name not in roles}


def _form(names: Sequence[str], first: Mapping[str, Any], columns: tuple[str, str] | None) -> tuple[str, dict[str, str]]:
    """`form_of` without columns that only accompany others. first: a row."""
    if columns is not None:
        return "questions and answers in two columns", {columns[0]: "what the user says", columns[1]: "the answer"}
    asked = next((name for name in ("prompt", "question", *TURNS, "instruction") if name in names), None)
    if "chosen" in names and "rejected" in names:
        about = {name: "what the instruction is about" for name in ("input", "context") if name in names}
        prompt = {} if asked is None else {asked: "what is asked", **(about if asked == "instruction" else {})}
        return "pairs of answers", {**prompt, "chosen": "the better answer", "rejected": "the worse answer"}
    if "chosen_messages" in names and "rejected_messages" in names:
        return "pairs of conversations", {"chosen_messages": "the better one", "rejected_messages": "the worse one"}
    if "preferred_output" in names:
        better, worse = ("preferred_output", "the better answer"), ("non_preferred_output", "the worse answer")
        return "pairs of answers in OpenAI's form", dict([("input", "what is asked"), better, worse])
    turns = next((name for name in TURNS if name in names), None)
    if turns is not None:
        return f"conversations{_dialect(first.get(turns))}", {turns: "the conversation"}
    if "completion" in names and asked is not None:
        kind = "prompts and completions" if isinstance(first.get(asked), (list, tuple)) else "texts that are continued"
        return kind, {asked: "the prompt", "completion": "what is learnt"}
    if "instruction" in names:
        about = {name: "what the instruction is about" for name in ("input", "context") if name in names}
        answer = next((name for name in ("output", "response", *ANSWERS) if name in names), "output")
        whose = "Dolly" if "context" in names else "Alpaca"
        return f"instructions in {whose}'s form", {"instruction": "what the user says", **about, answer: "the answer"}
    if is_plain_text(dict.fromkeys(names)):
        text = next(name for name in names if name.strip().lower() in ("text", "content", "body", "document"))
        return "texts without questions, which are learnt whole (continued training)", {text: "the text"}
    if asked is not None:
        return "prompts", {asked: "what is asked"}
    return "rows", {}


def _dialect(value: Any) -> str:
    """Whose form a conversation has, by its first turn."""
    turn = value[0] if isinstance(value, (list, tuple)) and value else None
    if isinstance(turn, Mapping):
        return (
            " in OpenAI's form (role, content)"
            if "role" in turn
            else " in ShareGPT's form (from, value)"
            if "from" in turn
            else ""
        )
    return " as text" if isinstance(value, str) else ""


# ------------------------------------------------------------------------------------------------ examples


def shown(example: Any) -> list[str]:
    """An example in a few lines, one message each."""
    match example:
        case Answered("", str(text)):
            return [f"text: {_short(text)}"]
        case Answered(prompt, answer):
            if isinstance(answer, str):
                return [f"prompt: {_short(str(prompt))}", f"completion: {_short(answer)}"]
            return _few([*_said(prompt), *_said(answer)])
        case Pair():
            last = [f"{name}: {_last(turns)}" for name, turns in (("better", example.chosen), ("worse", example.rejected))]
            return [*_few(_said(example.prompt)), *last]
        case Labelled():
            return [*shown(example.answered), "good" if example.is_desirable else "bad"]
        case list() | tuple() if example and isinstance(example[0], Labelled):
            return [line for one in example for line in shown(one)]
    turns = getattr(example, "turns", getattr(example, "prompt", example))
    return _few(_said(turns)) if isinstance(turns, (str, tuple, list)) else [_short(str(turns))]


def _said(turns: Turns | Sequence[Message]) -> list[str]:
    if isinstance(turns, str):
        return [f"prompt: {_short(turns)}"]
    return [_line(message) for message in turns]


def _line(message: Message) -> str:
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    called = f" (calls {', '.join(calls)})" if calls else ""
    unlearnt = " (not learnt)" if message["role"] == "assistant" and message.get("weight", 1) == 0 else ""
    content = message.get("content")
    seen = "[picture] " * len(sources_in([message]))
    return f"{message['role']}: {seen}{_short(text_of(content))}{called}{unlearnt}"


def _last(turns: Turns) -> str:
    return _short(turns) if isinstance(turns, str) else _line(turns[-1]).partition(": ")[2]


def _few(lines: list[str]) -> list[str]:
    if len(lines) <= _MESSAGES:
        return lines
    half = _MESSAGES // 2
    return [*lines[:half], f"… {len(lines) - 2 * half:,} messages more …", *lines[-half:]]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
