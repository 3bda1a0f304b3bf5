"""What `/v1/responses` answers with: a response whole or event by event, on a stream or a WebSocket, and a compaction."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bessemer.assistant.messages import BadCall, Called, RolledBack, TextDelta, ThinkingDelta, TurnEnd
from bessemer.serving.responses.items import encode_compaction
from bessemer.serving.responses.protocol import ResponsesRequest
from bessemer.serving.retrieval.annotations import AnswerCitations, call_result
from bessemer.serving.runtime.bodies import ApiError, withdrawn
from bessemer.serving.runtime.streams import PING, Reply, named_events
from bessemer.serving.runtime.worker import ChoiceEvents, Turns, text_of
from bessemer.tokenization.tokenizer import Tokenizer

#: Every how many signs of life in a silence is an event: it repeats the response, with the request's tools.
_EVENT_EVERY = 15
#: Name and body of an event.
_NamedEvent = tuple[str, dict[str, Any]]


class ResponseReply(Reply):
    """A response: the search, where one was made, and items of thinking, text and tool calls in their order."""

    def __init__(self, request: ResponsesRequest, tokenizer: Tokenizer, turns: Turns | None, question: str = "") -> None:
        """turns: None for a probe, which has no input. question: what was searched for."""
        self.identity = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._tokenizer = tokenizer
        self._turns = turns
        self._question = question
        self._sources = None if turns is None else turns.sources
        #: Of the message that is being written.
        self._citations: AnswerCitations | None = None
        self._created = int(time.time())
        self._completed: int | None = None
        self._output: list[dict[str, Any]] = []
        self._has_open_item = False
        self._status = "in_progress"
        self._incomplete: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._sequence_number = 0

    @property
    def output(self) -> Sequence[dict[str, Any]]:
        return self._output

    @property
    def is_over(self) -> bool:
        """Whether the last event was made."""
        return self._status != "in_progress"

    def whole(self, step: Iterable[ChoiceEvents]) -> dict[str, Any]:
        for _ in (*self._search(), *self._events(step)):
            pass
        return self.body()

    def start(self) -> str:
        begun = [self._event(name, response=self.body()) for name in ("response.created", "response.in_progress")]
        return self._written([*begun, *self._search()])

    def events(self, step: Iterable[ChoiceEvents]) -> str:
        return self._written(self._events(step))

    def sign_of_life(self, quiet: int) -> str:
        # Codex takes no comment for one, and drops a stream without events for 300 s
        if self.is_over or quiet % _EVENT_EVERY:
            return PING
        return self._written([self._event("response.in_progress", response=self.body())])

    def complete_probe(self) -> str:
        """The last event of a request without input."""
        self._end("completed")
        return self._written([self._event("response.completed", response=self.body())])

    def failed(self, error: ApiError) -> str:
        self._end("failed")
        self._error = {"code": error.code or "server_error", "message": str(error)}
        return self._written([self._event("response.failed", response=self.body())])

    def _written(self, events: Iterable[_NamedEvent]) -> str:
        """Events as this stream has them."""
        return named_events(events)

    def _end(self, status: str) -> None:
        self._status = status
        self._completed = int(time.time()) if status == "completed" else None

    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self._status,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "output": self._output,
            "usage": self._usage() if self.is_over else None,
            **_echoed(self._request),
        }

    def _search(self) -> Iterator[_NamedEvent]:
        """The item of the search, which is made before the model answers."""
        if self._sources is None:
            return
        item = self._open({"type": "file_search_call", "id": _new_id("fs"), "queries": [self._question], "results": None})
        yield self._event("response.output_item.added", output_index=self._last, item=item)
        for state in ("in_progress", "searching", "completed"):
            yield self._item_event(f"response.file_search_call.{state}")
        if self._request.shows_results:
            item["results"] = [call_result(hit) for hit in self._sources]
        yield from self._close()

    def _events(self, step: Iterable[ChoiceEvents]) -> Iterator[_NamedEvent]:
        for event in (event for _, events, *_ in step for event in events):
            match event:
                case ThinkingDelta(text):
                    yield from self._add_text("reasoning", "reasoning_text", text)
                case TextDelta(text) | BadCall(text):
                    yield from self._add_text("message", "output_text", text)
                case Called(call):
                    yield from self._close()
                    arguments = json.dumps(call.arguments, ensure_ascii=False)
                    item = self._open(
                        {"type": "function_call", "id": _new_id("fc"), "call_id": call.id, "name": call.name, "arguments": ""}
                    )
                    yield self._event("response.output_item.added", output_index=self._last, item=item)
                    yield self._item_event("response.function_call_arguments.delta", delta=arguments)
                    item["arguments"] = arguments
                    yield self._item_event("response.function_call_arguments.done", arguments=arguments, name=call.name)
                    yield from self._close()
                case RolledBack(reason):
                    raise withdrawn(reason)
                case TurnEnd(reason):
                    yield from self._close()
                    self._end("incomplete" if reason in ("length", "refused") else "completed")
                    if self._status == "incomplete":
                        self._incomplete = {"reason": "max_output_tokens" if reason == "length" else "content_filter"}
                    yield self._event(f"response.{self._status}", response=self.body())

    def _add_text(self, kind: str, part_kind: str, text: str) -> Iterator[_NamedEvent]:
        """More text of the last item, or a new item with one part."""
        if not self._has_open_item or self._output[-1]["type"] != kind:
            yield from self._close()
            item: dict[str, Any] = {"type": kind, "id": _new_id("rs" if kind == "reasoning" else "msg")}
            own: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            item = self._open({**item, **own, "content": []})
            yield self._event("response.output_item.added", output_index=self._last, item=item)
            item["content"].append(_part(part_kind))
            yield self._item_event("response.content_part.added", content_index=0, part=_part(part_kind))
            self._citations = None if kind != "message" or self._sources is None else AnswerCitations(self._sources)
        part = self._output[-1]["content"][0]
        part["text"] += text
        yield self._item_event(f"response.{part_kind}.delta", content_index=0, delta=text, **_log_probs(part_kind))
        for annotation in self._citations.feed(text) if self._citations is not None else ():
            part["annotations"].append(annotation)
            number = len(part["annotations"]) - 1
            named = {"content_index": 0, "annotation_index": number, "annotation": annotation}
            yield self._item_event("response.output_text.annotation.added", **named)

    def _close(self) -> Iterator[_NamedEvent]:
        if not self._has_open_item:
            return
        self._has_open_item = False
        item = self._output[-1]
        item["status"] = "completed"
        if item["type"] in ("reasoning", "message"):
            (part,) = item["content"]
            kind = part["type"]
            yield self._item_event(f"response.{kind}.done", content_index=0, text=part["text"], **_log_probs(kind))
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=self._last, item=item)

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        item["status"] = "in_progress"
        self._output.append(item)
        self._has_open_item = True
        return item

    @property
    def _last(self) -> int:
        return len(self._output) - 1

    def _usage(self) -> dict[str, Any]:
        turns = self._turns
        prompt, completion, cached = (
            (0, 0, 0) if turns is None else (turns.prompt_tokens, turns.completion_tokens, turns.cached_tokens)
        )
        reasoning = sum(
            len(self._tokenizer.encode(part["text"], add_bos=False))
            for item in self._output
            if item["type"] == "reasoning"
            for part in item["content"]
        )
        return _usage(prompt, completion, cached, reasoning)

    def _item_event(self, kind: str, **content: Any) -> _NamedEvent:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=self._last, **content)

    def _event(self, kind: str, **content: Any) -> _NamedEvent:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        # a copy: items grow after the event
        return kind, json.loads(json.dumps({"type": kind, "sequence_number": number, **content}))


#: Fields of the request that the response repeats as they are.
_ECHOED = {
    *("model", "previous_response_id", "max_output_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"),
    *("tool_choice", "parallel_tool_calls", "truncation", "background", "store", "metadata", "safety_identifier"),
    *("prompt_cache_key",),
}


def _echoed(request: ResponsesRequest) -> dict[str, Any]:
    """What the response says of its request. Fields without a value are null, since clients look for each."""
    settings = request.text.format
    form: dict[str, Any] = {"type": settings.type}
    if settings.type == "json_schema":
        form |= settings.model_dump(mode="json", by_alias=True)
    text = {"format": form} | ({} if request.text.verbosity is None else {"verbosity": request.text.verbosity})
    return {
        **request.model_dump(mode="json", by_alias=True, include=_ECHOED),
        "instructions": request.instructions or None,
        "tools": [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in request.tools],
        "text": text,
        "reasoning": {"effort": request.reasoning.effort, "summary": request.reasoning.summary},
        "top_logprobs": 0,
        "max_tool_calls": None,
        "service_tier": "default",
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _log_probs(part_kind: str) -> dict[str, Any]:
    """The field that clients expect in events of an answer's text."""
    return {"logprobs": []} if part_kind == "output_text" else {}


def _part(kind: str) -> dict[str, Any]:
    return {"type": kind, "text": ""} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


class SocketReply(ResponseReply):
    """A response whose events are lines of JSON, each a message of a WebSocket."""

    def _written(self, events: Iterable[_NamedEvent]) -> str:
        return "".join(f"{json.dumps(body)}\n" for _, body in events)


def compacted(step: Iterable[ChoiceEvents], turns: Turns) -> dict[str, Any]:
    """The body of a compaction. Raises ApiError where a hook took the summary back."""
    content = encode_compaction(text_of(step).strip())
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [{"type": "compaction", "id": _new_id("cmp"), "encrypted_content": content}],
        "usage": _usage(turns.prompt_tokens, turns.completion_tokens, turns.cached_tokens, 0),
    }


def _usage(prompt: int, completion: int, cached: int, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }
