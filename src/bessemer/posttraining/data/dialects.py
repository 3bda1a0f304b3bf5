"""Conversations in the dialects in which people keep them, read as messages of one form.

| written as | becomes |
|---|---|
| `role`, `content` (OpenAI, TRL); `from`, `value` (ShareGPT); `speaker`, `text` | `role`, `content` |
| speakers as `human`, `gpt`, `chatgpt`, `bard`, `bot`, `model`, `observation`, `function`, in any case | the four roles |
| `developer` | `system`, as when it is served |
| content in parts, of text, `reasoning` and `tool_call` | the texts, joined as when they are served; thoughts; calls |
| content in parts with pictures (`picture_rows.py`) | parts of texts and pictures |
| `function_call`, in a message or as a speaker; arguments as a string of JSON | `tool_calls`, arguments as an object |
| `thinking`, `reasoning` | `reasoning_content` |
| `weight`, `train`, `training`, `loss_weight` | `weight` 0 or 1 |
| `{"user": …, "assistant": …}`; a list of texts in turn | messages of the two |
| a string of JSON, as in a cell of CSV; columns of lists, as of older Parquet files of `datasets` | the list |

Raised is ValueError in one line, behind which a caller says which row it is.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.posttraining.data.picture_rows import is_picture_part, picture_part

Message = dict[str, Any]

#: Columns that hold conversations.
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
#: Names of speakers, in lower case → role.
_SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "input", "question", "usr"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bard", "bing", "claude", "gemini", "model"), "assistant"),
    **dict.fromkeys(("ai", "bot", "chatbot", "output", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
#: Speakers whose text is a call of a tool in JSON.
_CALLERS = ("function_call", "tool_call")
#: Keys of a turn: for its speaker, its text, the thinking before it, and whether it is learnt.
_WHO, _WHAT = ("role", "from", "speaker"), ("content", "value", "text")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_LEARNT = ("weight", "train", "training", "loss_weight")
#: Kinds of content parts that are text, thoughts, and calls of tools; and the keys of their text.
_TEXT_PARTS, _THOUGHT_PARTS = ("text", "input_text", "output_text", "refusal"), ("reasoning", "thinking")
_CALL_PARTS, _PART_KEYS = ("tool_call", "tool_use"), ("text", "value", "refusal", "thinking", "reasoning")


def messages_in(value: Any, key: str) -> list[Any]:
    """The messages of a conversation in any of the dialects, not yet checked. key: where it stands, for messages of errors.

    Values in no known dialect stay as they are; the check of messages reports them.
    """
    turns = _list_of(value, key)
    if turns and all(isinstance(turn, str) for turn in turns):
        if key == "turns":
            raise ValueError(f"{key}: a list of texts does not say who speaks; give messages with 'role' and 'content'")
        return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    messages: list[Any] = []
    for number, turn in enumerate(turns, start=1):
        messages += _messages_of(turn, f"{key}: turn {number}")
    first = next((place for place, one in enumerate(messages) if _role(one) != "system"), len(messages))
    if first > 1:
        # several messages of the system or the developer at the beginning become one
        texts = [str(one.get("content") or "") for one in messages[:first]]
        messages[:first] = [{"role": "system", "content": "\n\n".join(filter(None, texts))}]
    return messages


def _list_of(value: Any, key: str) -> Sequence[Any]:
    """The list of turns that a value holds. Raises ValueError, also for an empty one."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        value = _literal(value, key)
    if isinstance(value, Mapping):
        value = _rows_of_columns(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{key}: must be a list of at least one message")
    return value


def _literal(text: str, key: str) -> Any:
    """The value that a text holds as JSON or as Python's `repr`, which pandas writes into a cell of CSV."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = error
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{key}: its text is no list in JSON ({why})"[:200]) from None


def _rows_of_columns(value: Mapping[str, Any]) -> Any:
    """Turns of a mapping of lists, {"role": […], "content": […]}; the mapping itself where it is another."""
    lists = list(value.values())
    if not lists or not all(isinstance(one, (list, tuple)) for one in lists) or len({len(one) for one in lists}) > 1:
        # one message in place of a list
        return [value] if _named(value, _WHO) else value
    return [{name: one for name, one in zip(value, row, strict=True) if one is not None} for row in zip(*lists, strict=True)]


def _messages_of(turn: Any, where: str) -> list[Any]:
    """A turn as messages: one, or those of a question with its answer."""
    if not isinstance(turn, Mapping):
        return [turn]
    who = _named(turn, _WHO)
    if who is None:
        return _by_speaker(turn, where)
    given = str(turn[who]).strip().lower()
    what = _named(turn, _WHAT)
    said = {} if what is None else _said(turn[what], where)
    if given in _CALLERS:
        return [{"role": "assistant", "content": "", "tool_calls": _calls(said.get("content"), where)}]
    role = _SPEAKERS.get(given)
    if role is None and who != "role":
        known = ", ".join(dict.fromkeys(_SPEAKERS))
        raise ValueError(f"{where}: {who!r} must be one of {known}, got {turn[who]!r}"[:300])
    if what is None and who != "role":
        raise ValueError(f"{where} has no {who!r} and 'value'")
    # the check of messages names a role that it does not know
    message: Message = {"role": role or turn[who], **said}
    return [message | _others(turn, message, where)]


def _others(turn: Mapping[str, Any], message: Message, where: str) -> Message:
    """The keys of a message beside role and content."""
    kept = {name: turn[name] for name in ("tool_call_id", "name") if turn.get(name) is not None}
    calls = turn.get("tool_calls")
    if isinstance(calls, str):
        calls = _literal(calls, f"{where}: tool_calls") if calls.strip() else None
    if isinstance(turn.get("function_call"), Mapping) and not calls:
        calls = [{"function": turn["function_call"]}]
    if calls:
        kept["tool_calls"] = [_call(one) for one in calls] if isinstance(calls, (list, tuple)) else calls
    if isinstance(turn.get("refusal"), str) and not message.get("content"):
        kept["content"] = turn["refusal"]
    thought = next((turn[name] for name in _THOUGHTS if isinstance(turn.get(name), str) and turn[name].strip()), None)
    if thought is not None:
        kept["reasoning_content"] = thought
    learnt = next((turn[name] for name in _LEARNT if turn.get(name) is not None), None)
    # other dialects have this key on every turn; it matters only on the assistant's
    if learnt is not None and (message["role"] == "assistant" or "weight" in turn):
        kept["weight"] = int(learnt) if isinstance(learnt, bool) or learnt in (0, 1) else learnt
    return kept


def _by_speaker(turn: Mapping[str, Any], where: str) -> list[Any]:
    """The messages of a turn whose keys are the speakers: {"user": …, "assistant": …}."""
    said = {name: value for name, value in turn.items() if str(name).strip().lower() in _SPEAKERS and value is not None}
    if not said:
        raise ValueError(f"{where} has no 'role' and 'content', and no 'from' and 'value'")
    return [{"role": _SPEAKERS[str(name).strip().lower()], **_said(value, where)} for name, value in said.items()]


def _said(value: Any, where: str) -> Message:
    """The content of a message: a text, or the joined texts of its parts, with the thinking and the calls among the parts.
    Another value stays, and the check of messages reports it."""
    if not isinstance(value, (list, tuple)):
        return {"content": value}
    texts, thoughts, calls = [], [], []
    pictures: list[Message] = []
    for part in value:
        kind = (
            "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        )
        text = part if isinstance(part, str) else _text_of(part)
        if kind in _CALL_PARTS:
            given = part.get("value", {"name": part.get("name"), "arguments": part.get("input")})
            calls += _calls(given, where)
        elif kind in _THOUGHT_PARTS and text is not None:
            thoughts.append(text)
        elif kind in _TEXT_PARTS and text is not None:
            texts.append(text)
            pictures.append({"type": "text", "text": text})
        elif is_picture_part(part):
            pictures.append(picture_part(part, where))
        else:
            raise ValueError(
                f"{where}: its content has a part of the kind {kind!r}, and only texts and pictures are learnt"[:200]
            )
    return {
        "content": pictures if any(map(is_picture_part, pictures)) else "".join(texts),
        **({"tool_calls": calls} if calls else {}),
        **({"reasoning_content": "\n".join(thoughts)} if thoughts else {}),
    }


def _text_of(part: Any) -> str | None:
    found = (part.get(key) for key in _PART_KEYS) if isinstance(part, Mapping) else ()
    return next((text for text in found if isinstance(text, str)), None)


def _named(turn: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of some keys for which a turn has a value; else the first that it has."""
    return next((name for name in names if turn.get(name) is not None), next((name for name in names if name in turn), None))


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _calls(value: Any, where: str) -> list[Message]:
    """The calls of tools that a text holds in JSON, one or a list of them."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        given = None
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f"{where}: a function_call must be a call in JSON, with name and arguments, it is {value!r}"[:200])
    return [_call({"function": {"name": call["name"], "arguments": call.get("arguments") or {}}}) for call in calls]


def _call(call: Any) -> Any:
    """A call with its arguments as an object, as chat templates need them; another value stays, and the check of messages
    reports it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            read = None
        # arguments that are no JSON are learnt as they are
        arguments = read if isinstance(read, dict) else arguments
    kept = {name: call[name] for name in ("id",) if function is not call and call.get(name) is not None}
    return {
        **kept,
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }


def tools_in(value: Any) -> list[Any] | None:
    """Tools in OpenAI's form, also from a bare function or from Anthropic's `input_schema`. A string is read as JSON; raises
    ValueError if it is not JSON. A value that is no tool stays, and the check of tools reports it.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools must be a list in JSON ({error})"[:200]) from None
    if not value:
        return None
    return [_tool(one) for one in value] if isinstance(value, (list, tuple)) else value  # type: ignore[no-any-return]


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    function = {name: value for name, value in tool.items() if name not in ("type", "input_schema")}
    if isinstance(tool.get("input_schema"), Mapping):
        function["parameters"] = tool["input_schema"]
    return {"type": "function", "function": function}
