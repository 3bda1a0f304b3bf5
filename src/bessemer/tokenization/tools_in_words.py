"""Tools for chat templates that have no place for them: in the text of messages, as our own template `chatml` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: Tools as our templates describe them; in place of {}, each in JSON on a line of its own.
TOOLS_IN_WORDS = (
    "# Tools\n\nYou can call these functions, each described in JSON:\n<tools>\n{}\n</tools>\n\n"
    "To call one, write its name and its arguments in JSON, every call between tags of its own:\n"
    '<tool_call>\n{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `function` of a tool or a call; some data sets write it without the object around it."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def with_tools_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, *, in_system: bool = True
) -> list[dict[str, Any]]:
    """Messages for a template without a place for tools, which then stand in the text as Hermes models have them: described in
    the system message, called in `<tool_call>`, answered by the user in `<tool_response>`, results in a row in one message.

    in_system: whether there may be a system message; otherwise the first message describes them.
    """
    placed: list[dict[str, Any]] = []
    results: dict[str, Any] | None = None
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{message['content']}\n</tool_response>"
            if results is None:
                placed.append(results := {"role": "user", "content": answer})
            else:
                results["content"] += f"\n{answer}"
            continue
        results = None
        calls = [_call_in_words(call) for call in message.get("tool_calls") or ()]
        content = message.get("content")
        # parts, with pictures, are of the user alone
        if not isinstance(content, list):
            content = "\n".join(filter(None, [content, *calls]))
        placed.append({**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content})
    if tools:
        described = TOOLS_IN_WORDS.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if placed and placed[0]["role"] == "system":
            placed[0]["content"] += f"\n\n{described}"
        elif not in_system:
            placed[:1] = [{**first, "content": _behind(f"{described}\n\n", first["content"])} for first in placed[:1]]
        else:
            placed.insert(0, {"role": "system", "content": described})
    return placed


def _call_in_words(call: Mapping[str, Any]) -> str:
    function = function_of(call)
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {written}}}\n</tool_call>'


def _behind(text: str, content: Any) -> Any:
    return [{"type": "text", "text": text}, *content] if isinstance(content, list) else text + content
