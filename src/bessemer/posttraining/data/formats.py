"""Rows of data sets as examples: the formats that TRL documents, OpenAI's, ShareGPT's, Alpaca's, and transcripts as of hh-rlhf.

| keys | becomes |
|---|---|
| `messages`, `conversations`, … (and `tools`), in any dialect of `dialects.py` | a conversation |
| `instruction`, `input`, `output`, `history` (Alpaca); `instruction`, `context`, `response` (Dolly) | a conversation |
| `prompt` and `completion`, messages or texts | a conversation or a text, of which the completion is learnt |
| `prompt`, `chosen`, `rejected` (`margin`, `confidence`); without `prompt` what the two begin with alike | a pair of answers |
| `input`, `preferred_output`, `non_preferred_output` (OpenAI) | a pair of answers |
| `prompt`, `completion`, `label` (or `kto_tag`) | an answer that is good or bad |

A message of the assistant's with `"weight": 0` is read and not learnt, as in OpenAI's format. A `content` that is
null is empty.

The prompt of a pair may also stand under `question`, `instruction`, `messages` or `conversations`. A text under `system` (or
`system_prompt`) is the system message of a row that has none of its own. In a CSV file everything is text, and an empty cell is
absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.core.config import nearest
from bessemer.posttraining.data.dialects import TURNS, messages_in, tools_in
from bessemer.posttraining.data.picture_rows import has_pictures, pictures_of, sources_in, text_of, with_pictures
from bessemer.tokenization.chat import checked_messages, checked_tools

#: Advice for texts without questions.
CONTINUE = "texts without questions are learnt by continued pretraining: bessemer recipes show continue"

Message = dict[str, Any]
#: Messages of a conversation, or a text without roles.
Turns = tuple[Message, ...] | str

#: Values of a label: CSV files hold words, and many data sets zeros and ones.
_TRUTH = {
    **dict.fromkeys(("true", "1", "1.0", "good", "yes", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "bad", "no", "undesirable"), False),
}
#: Columns of the system message; columns of whether an answer is good.
SYSTEMS = ("system", "system_prompt", "system_message")
LABELS = ("label", "kto_tag")
#: Columns that usually hold the question. A pair of texts with one of them is refused: its prompt belongs under `prompt`.
_QUESTIONS = ("input", "query", "context", "user", "text", "problem")
#: Usual columns of questions, of answers, and of texts alone, in lower case.
PROMPTS = ("prompt", "question", "input", "query", "request", "ticket", "message", "problem", "user", "instruction")
ANSWERS = ("completion", "answer", "output", "response", "reply", "resolution", "solution", "assistant")
_TEXTS = {"text", "content", "body", "document"}
#: A turn of a transcript: `\n\nHuman: …\n\nAssistant: …`.
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
#: Keys of a message that are kept besides role and content: those of chat templates, and its weight in the loss.
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight")


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer to it, both messages or both texts. Where the prompt has no messages, the answer is the whole
    conversation, and every turn of the assistant in it is learnt."""

    prompt: Turns
    answer: Turns
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, of which the first is preferred.

    margin: how much better it is, where that is known. confidence: how probably it is better, from one half to 1. weight: that
    of the pair in the mean, for example where a prompt has several pairs. folder: where the paths of its pictures begin.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: tuple[Message, ...] = ()
    margin: float = 0.0
    confidence: float = 1.0
    weight: float = 1.0
    folder: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Labelled:
    """An answer that is good or bad by itself. folder: where the paths of its pictures begin."""

    answered: Answered
    is_desirable: bool
    folder: Path | None = field(default=None, compare=False)


def as_answered(row: Mapping[str, Any]) -> Answered:
    """A row for supervised tuning. Raises ValueError or RequestError, in one line, for one in none of the formats."""
    tools = tools_of(row)
    _refuse_sounds(row)
    pictures = pictures_of(row)
    if (name := _conversation_key(row)) is not None:
        return Answered((), _checked_pictures(with_pictures(_under_system(row, _spoken(row[name], name)), pictures)), tools)
    if "completion" in row:
        prompt, answers = _prompt_and_answers(row, ("completion",))
        prompt, (completion,) = about_pictures(prompt, answers, pictures)
        return Answered(prompt, completion, tools)
    if "instruction" in row:
        column = next((name for name in ("output", "response", *ANSWERS) if name in row), "output")
        prompt, answer = _alpaca_prompt(row), _cell(row, column)
        return Answered(_placed(prompt, pictures), _spoken([_said("assistant", answer)], column), tools)
    raise ValueError(
        f"is in no known format: it has {_named(row)}; wanted are messages, conversations, prompt and completion, or "
        f"instruction and output{f'; {CONTINUE}' if is_plain_text(row) else ''}"
    )


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a text and no answer, as rows for pretraining do."""
    names = {str(name).strip().lower() for name in row}
    return bool(names & _TEXTS) and not names & {*TURNS, "completion", "chosen", *PROMPTS, *ANSWERS}


def answer_in_columns(row: Mapping[str, Any], columns: tuple[str, str]) -> Answered:
    """A row whose question and answer stand in two columns, as a conversation. Raises ValueError or RequestError, in one
    line."""
    for name in columns:
        if name not in row:
            raise ValueError(f"has no column {name!r}{nearest(name, list(row))}")
    question, answer = (_cell(row, name) for name in columns)
    prompt = _under_system(row, messages_of([_said("user", question)], columns[0]))
    return Answered(_placed(prompt, pictures_of(row)), _spoken([_said("assistant", answer)], columns[1]), tools_of(row))


def as_document(row: Mapping[str, Any]) -> Answered:
    """A row of a plain text, which is learnt whole. Raises ValueError, in one line, for a row without one."""
    column = next((name for name in row if str(name).strip().lower() in _TEXTS), "text")
    return Answered("", _text(row, column))


def _cell(row: Mapping[str, Any], name: str) -> str:
    """A cell that holds text or a number."""
    value = row.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else _text(row, name)


def as_prompt(row: Mapping[str, Any], column: str = "prompt") -> tuple[Message, ...]:
    """A row's prompt as messages, after its system message; a text becomes the user's message. Raises ValueError or
    RequestError, in one line, also for an empty question.
    """
    if column not in row:
        raise ValueError(f"has no column {column!r}{nearest(column, list(row))}")
    given = row[column]
    messages = messages_of([_said("user", _text(row, column))] if isinstance(given, str) else given, column)
    _refuse_pictures(messages)
    last = messages[-1]
    if last["role"] == "assistant":
        raise ValueError(f"{column}: it ends with the assistant, whose turn it is to answer")
    # a tool may return nothing
    if last["role"] != "tool" and not last["content"].strip():
        raise ValueError(f"{column}: its last message is empty, so that nothing is asked")
    return _under_system(row, messages)


def as_pair(row: Mapping[str, Any], *, pictures: bool = False) -> Pair:
    """A row of a chosen and a rejected answer. pictures: whether the prompt may have them. Raises ValueError or RequestError,
    in one line."""
    given, row = row, _with_our_names(row)
    _refuse_sounds(row, ("videos", "audios") if pictures else ("images", "videos", "audios"))
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(f"needs the keys 'chosen' and 'rejected'; it has {_named(row)}")
    prompt, (chosen, rejected) = _prompt_and_answers(row, ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same, so that neither is preferred")
    if pictures:
        prompt, (chosen, rejected) = about_pictures(prompt, (chosen, rejected), pictures_of(given))
    else:
        _refuse_pictures(prompt, chosen, rejected)
    confidence, weight = _number(row, "confidence", 1.0), _number(row, "weight", 1.0)
    if not 0.5 <= confidence <= 1:
        raise ValueError(f"confidence is how probably chosen is better, from 0.5 to 1; it is {confidence:g}")
    if weight <= 0:
        raise ValueError(f"weight must be above 0, it is {weight:g}")
    return Pair(prompt, chosen, rejected, tools_of(row), _number(row, "margin", 0.0), confidence, weight)


def about_pictures(prompt: Turns, answers: Sequence[Turns], pictures: Sequence[str]) -> tuple[Turns, Sequence[Turns]]:
    """A prompt with the pictures of a row's columns, and its answers: of texts, messages. Raises ValueError for a place
    without a picture."""
    if pictures and isinstance(prompt, str):
        prompt, answers = (_said("user", prompt),), [(_said("assistant", str(answer)),) for answer in answers]
    return _placed(prompt, pictures), answers


def _placed(prompt: Turns, pictures: Sequence[str]) -> Turns:
    """A prompt with the pictures of a row's columns. Raises ValueError for a place without a picture."""
    return prompt if isinstance(prompt, str) else _checked_pictures(with_pictures(prompt, pictures))


def _checked_pictures(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    sources_in(messages)
    return messages


def _refuse_sounds(row: Mapping[str, Any], names: Sequence[str] = ("videos", "audios")) -> None:
    """Raise ValueError for a row with videos or sounds beside its words: an answer about them cannot be learnt from the words
    alone."""
    for name in names:
        if isinstance(row.get(name), (list, tuple, Mapping)) and row[name]:
            raise ValueError(f"has {name}, which are not learnt yet, and the words alone would teach to guess")


#: Why a row with pictures is left out where their tokens alone would be read.
NO_PICTURES = "has pictures, which are learnt by sft, finetune, preference and rl alone"


def _refuse_pictures(*turns: Turns) -> None:
    """Raise ValueError for pictures in messages."""
    if any(map(has_pictures, turns)):
        raise ValueError(NO_PICTURES)


def _with_our_names(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair in another format, as OpenAI's, with the names of ours."""
    for name in ("chosen", "rejected"):
        if name not in row and f"{name}_messages" in row:
            row = {**row, name: row[f"{name}_messages"]}
    if "preferred_output" not in row or "non_preferred_output" not in row:
        return row
    asked = row.get("input")
    given = dict(asked) if isinstance(asked, Mapping) else {"messages": asked}
    return {
        "prompt": given.get("messages"),
        "tools": given.get("tools"),
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
    }


def _number(row: Mapping[str, Any], name: str, absent: float) -> float:
    value = row.get(name)
    if value is None or value == "":
        return absent
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, it is {value!r}")
    return number


def as_labelled(row: Mapping[str, Any], *, pictures: bool = False) -> Labelled:
    """A row of an answer and whether it is good. In a conversation without a prompt the last turn is the answer.

    pictures: whether they may stand before it. Raises ValueError or RequestError, in one line.
    """
    given = next((row[name] for name in LABELS if row.get(name) is not None), None)
    label = _TRUTH.get(str(given).strip().lower())
    if label is None:
        raise ValueError(f"label must be true or false, it is {given!r}")
    answered = as_answered(row)
    if not pictures:
        _refuse_pictures(answered.prompt, answered.answer)
    if not answered.prompt and not isinstance(answered.answer, str):
        *before, last = answered.answer
        if last["role"] != "assistant":
            raise ValueError(f"the last turn is judged, which must be the assistant's, not of {last['role']!r}")
        answered = Answered(tuple(before), (last,), answered.tools)
    return Labelled(answered, label)


def as_labelled_answers(row: Mapping[str, Any], *, pictures: bool = False) -> list[Labelled]:
    """A labelled answer, or a pair as one that is good and one that is bad. pictures: as in `as_pair`. Raises ValueError or
    RequestError, in one line."""
    if "chosen" not in row:
        return [as_labelled(row, pictures=pictures)]
    pair = as_pair(row, pictures=pictures)
    for name, value in (("confidence", pair.confidence), ("weight", pair.weight)):
        if value != 1:
            raise ValueError(
                f"{name} is of a pair, and its answers are taken one by one; leave it out, or take a loss of pairs"
            )
    sides = ((pair.chosen, True), (pair.rejected, False))
    return [Labelled(Answered(pair.prompt, answer, pair.tools), label) for answer, label in sides]


def plain_turns(turns: Turns) -> str | list[Message]:
    """Turns as JSON values."""
    return turns if isinstance(turns, str) else list(turns)


def conversation_text(messages: Sequence[Message]) -> str:
    """Readable form of messages: the user's text alone, or every message with its role."""
    if len(messages) == 1:
        return text_of(messages[0].get("content"))
    return "\n\n".join(f"{message['role']}: {text_of(message.get('content'))}" for message in messages)


def _prompt_and_answers(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """The prompt and the answers under the keys, all messages or all texts."""
    given = [row[key] for key in keys]
    name = next((name for name in ("prompt", "question") if name in row), None)
    if name is not None or (name := _conversation_key(row)) is not None:
        prompt = row[name]
    elif "instruction" in row:
        prompt, name = list(_alpaca_prompt(row)), "instruction"
    else:
        return _shared_prompt(row, given, keys)
    has_system = bool(_system(row))
    if isinstance(prompt, str):
        if not has_system and all(isinstance(value, str) for value in given):
            return prompt, [_filled(value, key) for value, key in zip(given, keys, strict=True)]
        if all(_begins_with_the_prompt(value) for value in given):
            return _shared_prompt(row, given, keys)
        prompt = [_said("user", prompt)]
    messages = _under_system(row, messages_of(prompt, name))
    return messages, [_answer(value, key) for value, key in zip(given, keys, strict=True)]


def _conversation_key(row: Mapping[str, Any]) -> str | None:
    return next((name for name in TURNS if row.get(name) is not None), next((name for name in TURNS if name in row), None))


def _begins_with_the_prompt(value: Any) -> bool:
    """Whether an answer in messages is a conversation from the beginning, as in UltraFeedback."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) in ("system", "user", "human")


def _system(row: Mapping[str, Any]) -> str:
    given = (row.get(name) for name in SYSTEMS)
    return next((system for system in given if isinstance(system, str) and system.strip()), "")


def _under_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with the row's system message before them, unless they begin with one."""
    system = _system(row)
    return (_said("system", system), *messages) if system and messages[0]["role"] != "system" else messages


def _shared_prompt(row: Mapping[str, Any], given: Sequence[Any], keys: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """The common beginning of conversations, transcripts or texts, and the rest of each."""
    if all(isinstance(value, str) and _TURN.match(value) for value in given):
        given = [_transcript(value) for value in given]
    if any(isinstance(value, str) for value in given):
        if not all(isinstance(value, str) for value in given):
            raise ValueError(f"{' and '.join(keys)} must both be texts or both messages")
        shared = _alike(given)
        question = next((name for name in _QUESTIONS if name in row), None)
        if question is not None or not shared:
            where = "they begin with nothing alike" if question is None else f"and there is {question!r}"
            raise ValueError(
                f"{' and '.join(keys)} are texts without a prompt, {where}; give the prompt under the key 'prompt'"
            )
        # the space belongs to the first different word
        if shared and given[0][shared - 1] == " ":
            shared -= 1
        return given[0][:shared], [_filled(value[shared:], key) for value, key in zip(given, keys, strict=True)]
    conversations = [messages_of(value, key) for value, key in zip(given, keys, strict=True)]
    shared = _alike(conversations)
    while shared and any(len(one) <= shared or one[shared]["role"] != "assistant" for one in conversations):
        shared -= 1
    if not shared:
        raise ValueError(f"{' and '.join(keys)} begin with no message alike; give the prompt under the key 'prompt'")
    prompt = _under_system(row, conversations[0][:shared])
    return prompt, [_spoken(one[shared:], key) for one, key in zip(conversations, keys, strict=True)]


def _alike(values: Sequence[Sequence[Any]]) -> int:
    """The number of first elements that are equal in all."""
    number = 0
    for elements in zip(*values, strict=False):
        if any(element != elements[0] for element in elements):
            break
        number += 1
    return number


def _answer(value: Any, key: str) -> tuple[Message, ...]:
    """An answer in messages; a text is one message of the assistant's."""
    if isinstance(value, str):
        value = [_said("assistant", _filled(value, key))]
    answer = _spoken(value, key)
    if answer[0]["role"] != "assistant":
        raise ValueError(f"{key}: the answer must begin with the assistant, not with {answer[0]['role']!r}")
    return answer


def _spoken(value: Any, key: str) -> tuple[Message, ...]:
    """The messages. Raises ValueError where the assistant says nothing in them."""
    messages = messages_of(value, key)
    if not any(
        one["role"] == "assistant" and ((one.get("content") or "").strip() or one.get("tool_calls")) for one in messages
    ):
        raise ValueError(f"{key}: the assistant says nothing in it, so there is nothing to learn")
    return messages


def messages_of(value: Any, key: str) -> tuple[Message, ...]:
    """Messages from any dialect of `dialects.py`, checked, also for the order of roles, and with the keys of `_KEPT`. key:
    where they stand, for errors. Raises ValueError or RequestError, in one line."""
    given = [_without_null(one) for one in messages_in(value, key)]
    messages = checked_messages(given, first=1)
    for message, own in zip(messages, given, strict=True):
        # the check keeps the places of pictures alone
        if has_pictures([message]):
            message["content"] = list(own["content"])
    for number, (before, message) in enumerate(zip([None, *messages], messages, strict=False), start=1):
        role = message["role"]
        if role == "system" and before is not None:
            raise ValueError(f"{key}: message {number}: a system message stands at the beginning")
        if message.get("weight", 1) not in (0, 1):
            raise ValueError(f"{key}: message {number}: weight must be 0 or 1, it is {message['weight']!r}"[:200])
        if role == "tool" and (before is None or before["role"] not in ("assistant", "tool")):
            raise ValueError(f"{key}: message {number}: a tool answers the assistant, and here it answers nobody")
    return tuple({name: message[name] for name in ("role", "content", *_KEPT) if name in message} for message in messages)


def _without_null(message: Any) -> Any:
    """A message whose `content` is null as an empty one; beside calls of tools it may be absent."""
    if isinstance(message, Mapping) and message.get("content", "") is None and not message.get("tool_calls"):
        return {**message, "content": ""}
    return message


def _alpaca_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    named = [name for name in ("instruction", "input", "context") if row.get(name) is not None and str(row[name]).strip()]
    # where all are empty, the error names the first
    question = "\n\n".join(_cell(row, name) for name in named or ("instruction",))
    before = []
    for turn in row.get("history") or ():
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history must be a list of a question and an answer each, and holds {turn!r}"[:200])
        before += [_said("user", turn[0]), _said("assistant", turn[1])]
    return _under_system(row, messages_of([*before, _said("user", question)], "instruction"))


def _transcript(text: str) -> list[Message]:
    """The turns of a transcript, each of which follows an empty line."""
    parts = _TURN.split(text)[1:]
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [_said(role, said.strip()) for role, said in zip(roles, parts[1::2], strict=True)]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        said = "is empty" if value is None or value == "" else f"holds {value!r}"
        raise ValueError(f"needs a text under {key!r}, which {said}"[:200])
    return value


def _filled(value: str, key: str) -> str:
    if not value.strip():
        raise ValueError(f"{key}: the answer is empty")
    return value


def tools_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The tools of a row, under `tools` or OpenAI's older `functions`; some data sets hold them as a string of JSON."""
    return tuple(checked_tools(tools_in(row.get("tools") or row.get("functions"))) or ())


def _named(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no keys"
