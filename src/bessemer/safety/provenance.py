"""Where a call's arguments come from: which calls a tainted conversation may make, without reading what its text asks for.

A value was *said* where it stands in what the user or the system prompt says, or in the result of a tool into which no stranger
writes. It is a *record's* where it is a whole field of another result. It is a *stranger's* where it stands in such a result
and is neither: an address in running text. The rest was made up by the model: a sum, the words of a search.

| a call | what it names was said | a record's, or made up | a stranger's |
|---|---|---|---|
| that reads | made | made | asked back where the user named where it was read, else refused |
| that acts, as the user asked for | made | asked back, or made (`records`) | as above |
| that acts, and nobody asked for | asked back | refused | refused |

The user *asked for* a tool where their words name its verb (`send`, `mail`, `forward`) and what it is about (`email`). An
attacker writes neither these words nor the rules. Control that follows from what is trusted, and tracked data: CaMeL
(Debenedetti et al. 2025). What it does to attacks: AgentDojo (Debenedetti et al. 2024; `benchmarks/agent_injections.py`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

from bessemer.assistant.messages import Message, ToolCall
from bessemer.core.policy import CallRules

Outcome = Literal["allow", "ask", "deny"]
#: A value of a call with the name of its argument.
_Named = tuple[str, Any]

#: A result that is longer is not taken apart, and a field that is longer is running text.
_LONGEST_RESULT, _LONGEST_FIELD = 200_000, 120
_WORD = re.compile(r"[^\W\d_]+|\d+")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Verdict:
    """What happens to a call, and why: for the assistant, and for a person who is asked."""

    outcome: Outcome
    reason: str = ""


def verdict(call: ToolCall, messages: Sequence[Message], rules: CallRules) -> Verdict:
    """The verdict on a call after these messages."""
    sources = _Sources.of(messages, rules)
    if not sources.results:
        return Verdict("allow")
    values = list(_values(call.arguments, rules))
    unsaid = [value for value in values if not is_said(value[1], sources.said)]
    records = _records(sources.results)
    strange = [value for value in unsaid if _written(value[1]) not in records and _stands_in(value[1], sources.results)]
    is_requested = _is_requested(call.name, sources.asked, rules, by_verb=bool(values) and not unsaid)
    if rules.only_reads(call.name):
        if not strange:
            return Verdict("allow")
    elif is_requested and (not unsaid or (rules.records == "allow" and not strange)):
        return Verdict("allow")
    if not is_requested and (unsaid or not values):
        return Verdict("deny", f"the user has not asked for {call.name}" + (f", nor named {_shown(unsaid)}" if unsaid else ""))
    if foreign := [value for value in strange if not _stands_in(value[1], sources.pointed_at)]:
        return Verdict("deny", f"{_shown(foreign)} stands only in text of unknown authors")
    return Verdict("ask", f"the user has not named {_shown(unsaid)}" if unsaid else f"the user has not asked for {call.name}")


# -- what was said


@dataclass(frozen=True)
class _Sources:
    """asked: what the user says. said: that, and what the system prompt and trusted tools say. results: of other tools,
    documents and memory. pointed_at: those of them that a call returned all of whose values were said: the user named the file
    or the page."""

    asked: str
    said: str
    results: tuple[str, ...]
    pointed_at: tuple[str, ...]

    @classmethod
    def of(cls, messages: Sequence[Message], rules: CallRules) -> Self:
        calls = {call.id: call for message in messages for call in message.calls}
        asked: list[str] = []
        said: list[str] = []
        results: list[tuple[str, ToolCall | None]] = []
        for message in messages:
            for part in message.parts:
                if part.origin == "user":
                    asked.append(part.text)
                if part.origin in ("user", "system") or (part.origin == "tool" and rules.trusts(part.source)):
                    said.append(part.text)
                elif part.is_tainted:
                    results.append((part.text, calls.get(message.call_id)))
        whole = "\n".join(said)
        pointed_at = (
            text
            for text, call in results
            if call is not None
            and (values := list(_values(call.arguments, rules)))
            and all(is_said(value, whole) for _, value in values)
        )
        return cls("\n".join(asked), whole, tuple(text for text, _ in results), tuple(pointed_at))


def is_said(value: Any, text: str) -> bool:
    """Whether a text holds a value: a number in any form, a string as whole words, whatever its case and spaces."""
    if isinstance(value, int | float):
        return any(abs(number - value) < 1e-9 for number in _numbers(text))
    written, whole = _written(value), _written(text)
    place = whole.find(written)
    while place >= 0:
        before, after = whole[place - 1 : place], whole[place + len(written) : place + len(written) + 1]
        if not (before.isalnum() and written[:1].isalnum()) and not (after.isalnum() and written[-1:].isalnum()):
            return True
        place = whole.find(written, place + 1)
    return False


@lru_cache(maxsize=128)
def _written(value: Any) -> str:
    return " ".join(str(value).casefold().split())


@lru_cache(maxsize=128)
def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(found.replace(",", "")) for found in _NUMBER.findall(text))


def _stands_in(value: Any, texts: Iterable[str]) -> bool:
    return any(is_said(value, text) for text in texts)


def _values(arguments: Any, rules: CallRules, name: str = "") -> Iterator[_Named]:
    """The values that choose whom or what a call is about."""
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            # below an argument a key may be whom a call is about, and not a field's name
            if name and (isinstance(value, bool | None) or not str(key).isidentifier()):
                yield name, key
            if not rules.is_detail(str(key)):
                yield from _values(value, rules, str(key))
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            yield from _values(value, rules, name)
    elif not isinstance(arguments, bool) and arguments is not None and str(arguments).strip():
        yield name, arguments


def _shown(values: Sequence[_Named]) -> str:
    shown = [f"{name} {json.dumps(value, ensure_ascii=False, default=str)[:80]}" for name, value in values[:3]]
    return ", ".join(shown) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


# -- records


def _records(results: Iterable[str]) -> frozenset[str]:
    """The whole fields of results in JSON, or as Python prints values; of other results there are none."""
    return frozenset().union(*map(_fields, results))


@lru_cache(maxsize=128)
def _fields(result: str) -> frozenset[str]:
    return frozenset(_written(field) for field in _leaves(_parsed(result)) if 0 < len(str(field)) <= _LONGEST_FIELD)


def _parsed(text: str) -> Any:
    if len(text) > _LONGEST_RESULT or text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values. A text of several lines is none."""
    pending = [value]
    while pending:
        match pending.pop():
            case Mapping() as mapping:
                pending += [*mapping, *mapping.values()]
            case list() | tuple() as items:
                pending += items
            case str() as text if "\n" in text:
                pass
            case None | bool():
                pass
            case leaf:
                yield leaf


# -- what was asked for


def _is_requested(name: str, asked: str, rules: CallRules, *, by_verb: bool) -> bool:
    """Whether a text has the verb of a tool's name, its first word, and one of the others, or other words for them.

    by_verb: the verb alone is enough, as in `send it to Alice`.
    """
    words = _stems(asked)
    verb, *rest = [part for part in re.split(r"[_\W]+", name.rpartition("__")[2].casefold()) if len(part) > 2] or [name]

    def is_there(part: str) -> bool:
        return not words.isdisjoint(_stem(word) for word in (part, *rules.words.get(part, ())))

    return is_there(verb) and (by_verb or not rest or any(map(is_there, rest)))


@lru_cache(maxsize=64)
def _stems(text: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in _WORD.findall(text.casefold()))


def _stem(word: str) -> str:
    """A word without the endings of plurals and verbs: `files` is `file`, `booked` is `book`."""
    for ending in ("ing", "ied", "ies", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)] + ("y" if ending in ("ied", "ies") else "")
    return word
