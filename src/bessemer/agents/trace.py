"""What an agent did, read from its journal: as lines, as spans of OpenTelemetry, replayed before other hooks, branched.

Spans follow OpenTelemetry's semantic conventions for generative AI (`gen_ai.*`, as of semantic conventions 1.38):
`invoke_agent` is the whole task, `chat MODEL` a message, `execute_tool NAME` a call. They are written as OTLP in JSON, which
collectors take as a file or at `/v1/traces`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from bessemer.agents.approvals import described
from bessemer.agents.journal import JOURNAL, Record, message_of_json, read_records, state_of
from bessemer.assistant.conversation import LOCAL, Conversation, Principal
from bessemer.assistant.hooks import Deny, Hook, Hooks, TurnContext
from bessemer.assistant.messages import Message, ToolCall
from bessemer.assistant.tools import Tool
from bessemer.core.errors import ArtefactError, RequestError, writing_to
from bessemer.core.hashing import hash_value

_SHOWN = 2_000


def lines_of(records: Sequence[Record]) -> Iterator[str]:
    """The journal for a person: a paragraph for each message and each result."""
    step = 0
    names: dict[str, str] = {}
    for record in records:
        match record["event"]:
            case "task":
                for message in record["messages"]:
                    yield f"{message['role']}: {_short(_text(message))}"
            case "message":
                message = record["message"]
                is_own = message["role"] == "assistant"
                step += is_own
                head = f"[{step}] assistant" if is_own else message["role"]
                if message.get("thinking"):
                    yield f"{head} thinks: {_short(message['thinking'])}"
                if _text(message):
                    yield f"{head}: {_short(_text(message))}"
                for call in message.get("calls", ()):
                    names[call["id"]] = call["name"]
                    yield f"{head} calls {described(call['name'], call['arguments'], _SHOWN)}"
                for reason in record.get("bad_calls", ()):
                    yield f"  {reason}"
            case "done":
                how = "" if record["how"] == "called" else f" ({record['how']})"
                yield f"  {record['name']}{how}: {_short(record['text'])}"
            case "end":
                yield f"end: {record['reason']}"


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["parts"])


def _short(text: str) -> str:
    """A text of the model's or a tool's for a terminal."""
    text = "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"


# --------------------------------------------------------------------------------------------------- OpenTelemetry


def otlp(records: Sequence[Record]) -> dict[str, Any]:
    """The journal as one `ExportTraceServiceRequest` in JSON. Ids follow from the journal, so that it gives the same ones
    again."""
    task = records[0]
    trace = task["id"]
    root = hash_value([trace, "task"], bits=64)
    model = str(task.get("model", ""))
    spans = [
        _span(
            trace,
            root,
            None,
            "invoke_agent bessemer",
            task["time"],
            records[-1]["time"],
            {
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.provider.name": "bessemer",
                "gen_ai.agent.name": "bessemer",
                "gen_ai.conversation.id": trace,
                "gen_ai.request.model": model,
            },
        )
    ]
    conversation = [message_of_json(message) for message in task["messages"]]
    calls: dict[str, Mapping[str, Any]] = {}
    begun: dict[str, float] = {}
    for number, record in enumerate(records):
        key = hash_value([trace, number], bits=64)
        match record["event"]:
            case "message" if record["message"]["role"] == "assistant":
                message = message_of_json(record["message"])
                calls = {call["id"]: call for call in record["message"].get("calls", ())}
                attributes = {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "bessemer",
                    "gen_ai.conversation.id": trace,
                    "gen_ai.request.model": model,
                    "gen_ai.usage.input_tokens": record["prompt_tokens"],
                    "gen_ai.usage.output_tokens": record["completion_tokens"],
                    "gen_ai.response.finish_reasons": [record["finish"]],
                    "gen_ai.input.messages": json.dumps(list(map(_otel_message, conversation)), ensure_ascii=False),
                    "gen_ai.output.messages": json.dumps([_otel_message(message)], ensure_ascii=False),
                }
                start = record["time"] - record["seconds"]
                spans.append(_span(trace, key, root, f"chat {model}", start, record["time"], attributes))
                conversation.append(message)
                conversation += [Message.tool("", "", reason) for reason in record.get("bad_calls", ())]
            case "message":
                conversation.append(message_of_json(record["message"]))
            case "begin":
                begun[record["call"]] = record["time"]
                calls[record["call"]] = {**calls[record["call"]], "arguments": record["arguments"]}
            case "done":
                call = calls[record["call"]]
                attributes = {
                    "gen_ai.operation.name": "execute_tool",
                    "gen_ai.tool.name": record["name"],
                    "gen_ai.tool.type": "function",
                    "gen_ai.tool.call.id": record["call"],
                    "gen_ai.tool.call.arguments": json.dumps(call["arguments"], ensure_ascii=False),
                    "gen_ai.tool.call.result": record["text"],
                    "bessemer.call": record["how"],
                }
                if record["is_error"]:
                    attributes["error.type"] = "tool_error"
                start = begun[record["call"]] if record["call"] in begun else record["time"]
                spans.append(_span(trace, key, root, f"execute_tool {record['name']}", start, record["time"], attributes))
                conversation.append(Message.tool(record["call"], record["name"], record["text"]))
    scope = {"scope": {"name": "bessemer.agents", "version": package_version("bessemer")}, "spans": spans}
    resource = {"attributes": _attributes({"service.name": "bessemer", "service.version": package_version("bessemer")})}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}


def _otel_message(message: Message) -> dict[str, Any]:
    """A message in the form of `gen_ai.input.messages`."""
    parts: list[dict[str, Any]] = []
    if message.thinking:
        parts.append({"type": "reasoning", "content": message.thinking})
    if message.role == "tool":
        parts.append({"type": "tool_call_response", "id": message.call_id, "response": message.text})
    elif message.text:
        parts.append({"type": "text", "content": message.text})
    parts += [
        {"type": "tool_call", "id": call.id, "name": call.name, "arguments": dict(call.arguments)} for call in message.calls
    ]
    return {"role": message.role, "parts": parts}


def _span(
    trace: str, id: str, parent: str | None, name: str, begin: float, end: float, attributes: Mapping[str, Any]
) -> dict[str, Any]:
    failed = "error.type" in attributes
    return {
        "traceId": trace,
        "spanId": id,
        **({} if parent is None else {"parentSpanId": parent}),
        "name": name,
        # 1 is internal, 3 a client's
        "kind": 3 if name.startswith("chat") else 1,
        "startTimeUnixNano": str(round(begin * 1e9)),
        "endTimeUnixNano": str(round(max(begin, end) * 1e9)),
        "attributes": _attributes(attributes),
        "status": {"code": 2} if failed else {},
    }


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"arrayValue": {"values": list(map(_value, value))}}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"stringValue": str(value)}


# ------------------------------------------------------------------------------------------------ replay and branch


def replayed(
    records: Sequence[Record], hooks: Sequence[Hook], tools: Mapping[str, Tool], principal: Principal = LOCAL
) -> Iterator[tuple[ToolCall, ToolCall | Deny]]:
    """What hooks decide about each recorded call, with the conversation as it was then. Nothing is generated or called.

    So a policy is tried on what agents have done before. tools: by name; a call of any other is passed over.
    """
    both = Hooks(tuple(hooks))
    conversation = Conversation(message_of_json(message) for message in records[0]["messages"])
    calls: dict[str, ToolCall] = {}
    step = 0
    for record in records[1:]:
        if record["event"] == "message":
            message = message_of_json(record["message"])
            step += message.role == "assistant"
            conversation.add(message, *(Message.tool("", "", reason) for reason in record.get("bad_calls", ())))
            calls = {call.id: call for call in message.calls}
        elif record["event"] == "done":
            call = calls[record["call"]]
            if call.name in tools:
                yield call, both.before_call(call, tools[call.name], TurnContext(conversation, principal, step))
            conversation.add(Message.tool(call.id, call.name, record["text"]))


def branch(source: Path, target: Path, step: int) -> None:
    """Write a new task that has done what `source` had done after some messages of the assistant, with their calls' results.

    The effects of calls are not undone. Raises RequestError for a step that the source has not, and ArtefactError where
    `target` has a journal.
    """
    records, _ = read_records(source)
    steps = state_of(records, source / JOURNAL).steps
    if not 0 <= step <= steps:
        raise RequestError(f"{source} has {steps} steps; --at {step} is none of them")
    kept: list[Record] = []
    seen = 0
    for record in records:
        if record["event"] == "message" and record["message"]["role"] == "assistant":
            if seen == step:
                break
            seen += 1
        if record["event"] != "end":
            kept.append(record)
    if (target / JOURNAL).exists():
        raise ArtefactError(f"{target}: there is a task in it already")
    first = {**kept[0], "id": hash_value([kept[0]["id"], step, str(target)], bits=128), "branched_from": kept[0]["id"]}
    with writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in [first, *kept[1:]])
        (target / JOURNAL).write_text(text, encoding="utf-8")
