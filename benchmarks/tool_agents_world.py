"""Small tasks whose answers need a tool: registers of made-up facts, calculators, dates. No PyTorch.

A task is a row: a question, its answer, and two tools by name, argument names and description, one of which answers it. Facts
are numbers that a register keeps for a name, drawn by hash: no text has them, so that a model cannot know them. `World` is the
environment: an episode is worth 1 where the last message is the answer and nothing else, and 0 otherwise.

Tools of the parts "trained", "unseen" and "searched" share no noun, no word of a name, no sentence of a description and no
argument. Settings are chosen on "searched", so that "unseen" is asked only by the test.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.episodes import StepResult
from bessemer.assistant.messages import EndReason, Message
from bessemer.assistant.tools import Tool

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def _word(chance: random.Random) -> str:
    """A made-up word of two or three syllables."""
    return "".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(chance.randint(2, 3)))


def _words(count: int, seed: str, without: Collection[str] = ()) -> list[str]:
    chance, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        if (word := _word(chance)) not in without:
            found[word] = None
    return list(found)


@dataclass(frozen=True)
class Part:
    """The words from which tools are made. A number is an argument without quotation marks in the question.

    Nouns, what names add to them, and arguments are made up and many, so that they are read from the prompt and not known.
    """

    registers: Sequence[str]
    calculators: Mapping[str, Callable[[int, int], int]]
    calendars: Mapping[str, int]
    affixes: Sequence[str]
    descriptions: Sequence[str]
    keys: Sequence[str]


_TRAINED = _words(600, "words of trained tools")
_UNSEEN = _words(160, "words of unseen tools", _TRAINED)
_SEARCHED = _words(160, "words of searched tools", [*_TRAINED, *_UNSEEN])
PARTS = {
    "trained": Part(
        registers=_TRAINED[:400],
        calculators={"sum": lambda a, b: a + b, "difference": lambda a, b: a - b, "maximum": max},
        calendars={"after": 1},
        affixes=_TRAINED[400:500],
        descriptions=("Gives the {}.", "Looks up the {}.", "Finds the {}.", "Returns the {}."),
        keys=_TRAINED[500:],
    ),
    "unseen": Part(
        registers=_UNSEEN[:80],
        calculators={"product": lambda a, b: a * b, "remainder": lambda a, b: a % b},
        calendars={"before": -1},
        affixes=_UNSEEN[80:120],
        descriptions=("Tells the {}.", "Knows the {} by heart."),
        keys=_UNSEEN[120:],
    ),
    "searched": Part(
        registers=_SEARCHED[:80],
        calculators={"quotient": lambda a, b: a // b, "minimum": min},
        calendars={"until": -1},
        affixes=_SEARCHED[80:120],
        descriptions=("Answers with the {}.", "Keeps the {}."),
        keys=_SEARCHED[120:],
    ),
}
#: How often a task is of a register, a calculator or a calendar.
KINDS = {"register": 6, "calculator": 3, "calendar": 1}


def fact(noun: str, name: str) -> int:
    """The number of three digits that the register of a noun keeps for a name."""
    return 100 + int.from_bytes(hashlib.sha256(f"{noun} {name}".encode()).digest()[:4], "big") % 900


def drawn_tasks(part: str, count: int, seed: str) -> list[dict[str, Any]]:
    """Tasks as rows {question, answer, call, tools, kind}, no two with the same question."""
    chance, found = random.Random(seed), {}
    while len(found) < count:
        task = _task(PARTS[part], chance)
        found.setdefault(task["question"], task)
    return list(found.values())


def _task(part: Part, chance: random.Random) -> dict[str, Any]:
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "register":
        noun, *others = chance.sample(part.registers, 2)
        arguments: list[Any] = [
            "".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(chance.randint(2, 3)))
        ]
        question, answer = f'What is the {noun} of "{arguments[0]}"?', str(fact(noun, arguments[0]))
    elif kind == "calculator":
        noun = chance.choice(list(part.calculators))
        others = [other for other in part.calculators if other != noun] + list(part.registers)
        arguments = sorted((chance.randint(100, 9999) for _ in range(2)), reverse=True)
        question = f"What is the {noun} of {arguments[0]} and {arguments[1]}?"
        answer = str(part.calculators[noun](*arguments))
    else:
        noun, others = chance.choice(list(part.calendars)), list(part.registers)
        day = datetime.date(2000, 1, 1) + datetime.timedelta(chance.randrange(10_000))
        arguments = [day.isoformat(), chance.randint(10, 99)]
        question = f'Which date is {arguments[1]} days {noun} "{arguments[0]}"?'
        answer = (day + datetime.timedelta(part.calendars[noun] * arguments[1])).isoformat()
    right = _tool(part, kind, noun, chance)
    tools = [right, _tool(part, "register", chance.choice(others), chance)]
    if tools[1]["noun"] in part.calculators:
        tools[1] = _tool(part, "calculator", tools[1]["noun"], chance)
    chance.shuffle(tools)
    call = {"name": right["name"], "arguments": dict(zip(right["keys"], arguments, strict=True))}
    return {"question": question, "answer": answer, "call": call, "tools": tools, "kind": kind}


def _tool(part: Part, kind: str, noun: str, chance: random.Random) -> dict[str, Any]:
    return {
        "kind": kind,
        "noun": noun,
        "name": "_".join(chance.sample([noun, chance.choice(part.affixes)], 2)),
        "keys": chance.sample(part.keys, 1 if kind == "register" else 2),
        "description": chance.choice(part.descriptions).format(noun if kind != "calendar" else f"date {noun}"),
    }


def made_tool(spec: Mapping[str, Any]) -> Tool:
    """The tool that a row describes. What it is asked wrongly is an error that the assistant reads."""
    kind, noun, keys = spec["kind"], spec["noun"], spec["keys"]
    part = next(part for part in PARTS.values() if noun in (*part.registers, *part.calculators, *part.calendars))
    types = {"register": ["string"], "calculator": ["integer"] * 2, "calendar": ["string", "integer"]}[kind]

    def answer(**arguments: Any) -> str:
        values = [arguments[key] for key in keys]
        if kind == "register":
            return str(fact(noun, values[0]))
        if kind == "calculator":
            return str(part.calculators[noun](*values))
        return (datetime.date.fromisoformat(values[0]) + datetime.timedelta(part.calendars[noun] * values[1])).isoformat()

    schema = {
        "type": "object",
        "properties": {key: {"type": type_} for key, type_ in zip(keys, types, strict=True)},
        "required": list(keys),
        "additionalProperties": False,
    }
    return Tool(spec["name"], spec["description"], schema, answer)


def demonstration(task: Mapping[str, Any], *, with_tools: bool) -> dict[str, Any]:
    """A task done rightly, as a row to tune on: by a call, or without tools by its bare answer."""
    question, answer = task["question"], task["answer"]
    if not with_tools:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    call = {"type": "function", "function": task["call"]}
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": answer},
            {"role": "assistant", "content": answer},
        ],
        "tools": [made_tool(spec).description_in_chat for spec in task["tools"]],
    }


class World:
    """One task with its two tools. Worth 1 where the last message is the answer."""

    offers_tools = True

    def __init__(self) -> None:
        self.tools: Sequence[Tool] = ()
        self._answer = ""

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        self.tools = [made_tool(spec) for spec in task["tools"]] if self.offers_tools else ()
        self._answer = task["answer"]
        return [Message.user(task["question"])]

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        return StepResult(float(end == "answer" and conversation.messages[-1].text.strip() == self._answer))


class NoTools(World):
    """The same tasks, and no tool."""

    offers_tools = False
