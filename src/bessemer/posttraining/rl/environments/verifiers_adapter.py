"""Environments of the package `verifiers`: `environment: verifiers:NAME`.

In that package a rollout calls a client for each message of the policy. Here the episode leads: the rollout runs on an event
loop of its own, and its client hands over the conversation and waits for the policy's message (`_Exchange`). The package calls
its tools itself, so for us they are client-side tools.

Up to version 0.1 an environment is loaded by `load_environment`, and plays in this process with several turns and tools. From
version 0.2 on a rollout is a program in a container that calls a server. Of those versions only tasks of one message are
supported: their prompts, lifecycle hooks and rewards.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.episodes import StepResult
from bessemer.assistant.messages import EndReason, Message
from bessemer.assistant.tools import Tool
from bessemer.core.errors import ConfigError
from bessemer.posttraining.rl.environments.registry import Environments


def verifiers(name: str, options: Mapping[str, Any], max_turns: int) -> Environments:
    """The environment of a name, with options for its `load_environment`, or for its taskset.

    Raises ConfigError for an environment that cannot be loaded, ImportError without the package.
    """
    import verifiers as package

    try:
        if hasattr(package, "load_environment"):
            return _classic(package, name, options, max_turns)
        import verifiers.v1 as v1

        return _single(v1, name, options)
    except ConfigError:
        raise
    except Exception as error:  # an environment's module may raise anything
        raise ConfigError(f"environment: verifiers:{name} cannot be loaded: {type(error).__name__}: {error}") from None


def message_from(given: Mapping[str, Any]) -> Message:
    """A message of the environment in the form of chat completions; of content in several parts the texts."""
    content = given.get("content") or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    match given.get("role"):
        case "system":
            return Message.system(content)
        case "tool":
            return Message.tool(str(given.get("tool_call_id", "")), str(given.get("name") or ""), content)
        case "user":
            return Message.user(content)
    raise ValueError(f"the environment gives a message of role {given.get('role')!r} where the policy is to answer")


# -- several turns: up to version 0.1


@dataclass(frozen=True)
class _Request:
    """The rollout waits for the policy's message."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    answer: asyncio.Future[Any]


@dataclass(frozen=True)
class _Over:
    """The rollout has ended: its output, or why it failed."""

    output: Mapping[str, Any] | None
    failure: BaseException | None


class _Loop:
    """An event loop on a thread of its own, which starts at its first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="verifiers", daemon=True).start()
            return self._loop

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the loop, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


class _Exchange:
    """One rollout of the package and its requests for the policy's messages. most: messages that it gets; the next request ends
    the rollout, which is then judged as it is."""

    def __init__(self, package: Any, loop: _Loop, most: int) -> None:
        self._package = package
        self._loop = loop
        self._left = most
        self._events: queue.SimpleQueue[_Request | _Over] = queue.SimpleQueue()
        self._asked: _Request | None = None
        self._rollout: Any = None

    def begin(self, rollout: Coroutine[Any, Any, Mapping[str, Any]]) -> None:
        self._rollout = asyncio.run_coroutine_threadsafe(rollout, self._loop.loop)

        def over(future: Any) -> None:
            failure = None if future.cancelled() else future.exception()
            output = None if future.cancelled() or failure is not None else future.result()
            self._events.put(_Over(output, failure))

        self._rollout.add_done_callback(over)

    def next(self) -> _Request | _Over:
        """Wait for the rollout's next event."""
        event = self._events.get()
        self._asked = event if isinstance(event, _Request) else None
        return event

    def answer(self, response: Any) -> None:
        """Give the rollout the policy's message."""
        assert self._asked is not None
        self._loop.loop.call_soon_threadsafe(self._asked.answer.set_result, response)

    async def ask(self, messages: Sequence[Any], tools: Sequence[Any]) -> Any:
        """Called by the client, on the event loop: wait for the policy's message."""
        if not self._left:
            raise self._package.OverlongPromptError("the episode has no turn left")
        self._left -= 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        plain = [_plain(message) for message in messages]
        self._events.put(_Request(plain, [_plain(tool) for tool in tools], answer))
        return await answer

    def cancel(self) -> None:
        if self._rollout is not None:
            self._rollout.cancel()


def _plain(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    dumped: Mapping[str, Any] = value.model_dump(exclude_none=True)
    return dumped


def _classic(package: Any, name: str, options: Mapping[str, Any], max_turns: int) -> Environments:
    environment = package.load_environment(name, **options)
    rows = [dict(row) for row in environment.get_dataset()]
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str | list):
            raise ConfigError(f"environment: row {number} of verifiers:{name} has no prompt")
    tasks = [{"prompt": row["prompt"], "number": number} for number, row in enumerate(rows)]
    loop = _Loop()
    client = _client_class(package)
    return Environments(lambda: _ClassicEnvironment(package, environment, rows, loop, client, max_turns), tasks)


def _client_class(package: Any) -> Any:
    """A subclass of the package's client that gets its messages from an `_Exchange`."""

    def respond(self: Any, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        return self.client.ask(prompt, tools or [])

    def unused(self: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError("the policy is asked by get_response")

    async def close(self: Any) -> None:
        return None

    abstract = dict.fromkeys(package.Client.__abstractmethods__, unused)
    return type("PolicyClient", (package.Client,), {**abstract, "get_response": respond, "close": close})


class _ClassicEnvironment:
    """One episode at a time of an environment of version 0.1."""

    waits = True

    def __init__(
        self, package: Any, environment: Any, rows: Sequence[Mapping[str, Any]], loop: _Loop, client: Any, max_turns: int
    ) -> None:
        self._package = package
        self._environment = environment
        self._rows = rows
        self._loop = loop
        self._client = client
        self._max_turns = max_turns
        self._exchange: _Exchange | None = None
        self._known = 0
        self.tools: Sequence[Tool] = ()

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        self.close()
        row = {"example_id": task["number"], **self._rows[task["number"]]}
        self._exchange = _Exchange(self._package, self._loop, self._max_turns)
        rollout = self._environment.run_rollout(row, self._client(self._exchange), "policy", {})
        self._exchange.begin(rollout)
        event = self._exchange.next()
        if isinstance(event, _Over):
            raise ValueError(f"the rollout ended before the policy was asked: {event.failure or event.output}")
        self.tools = [
            Tool(str(tool["name"]), str(tool.get("description", "")), tool.get("parameters") or {"type": "object"})
            for tool in event.tools
        ]
        self._known = len(event.messages)
        return [message_from(message) for message in event.messages]

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        assert self._exchange is not None, "an episode begins with reset"
        self._exchange.answer(self._response(conversation.messages[-1], end))
        event = self._exchange.next()
        if isinstance(event, _Over):
            self._exchange = None
            if event.output is None:
                raise event.failure or ValueError("the rollout was cancelled")
            if error := event.output.get("error"):
                raise ValueError(f"the rollout failed: {error}")
            return StepResult(float(event.output["reward"]))
        # the first new message is the policy's, the others came after it
        new = event.messages[self._known + 1 :]
        if len(event.messages) <= self._known or not new:
            raise ValueError("the environment rewrites the conversation, which a policy is not trained on")
        self._known = len(event.messages)
        return StepResult(0.0, [message_from(message) for message in new])

    def close(self) -> None:
        """End a rollout that is under way."""
        if self._exchange is not None:
            self._exchange.cancel()
            self._exchange = None

    def _response(self, message: Message, end: EndReason) -> Any:
        package = self._package
        types = package.types
        calls = [types.ToolCall(id=call.id, name=call.name, arguments=_json(call.arguments)) for call in message.calls]
        is_cut = end == "length"
        answered = types.ResponseMessage(
            content=message.text,
            reasoning_content=message.thinking or None,
            tool_calls=calls or None,
            finish_reason="length" if is_cut else "tool_calls" if calls else "stop",
            is_truncated=is_cut,
        )
        return types.Response(id="policy", created=0, model="policy", message=answered)


def _json(arguments: Mapping[str, Any]) -> str:
    import json

    return json.dumps(arguments, ensure_ascii=False)


# -- one message: since version 0.2


def _single(v1: Any, name: str, options: Mapping[str, Any]) -> Environments:
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

    taskset = load_taskset(taskset_config_type(name).model_validate({"id": name, **options}))
    if not taskset.bounded:
        raise ConfigError(f"environment: verifiers:{name} has tasks without an end; give it a limit in environment_options")
    kind = type(taskset).task_type()
    if kind.NEEDS_CONTAINER or kind.toolsets(taskset.config.task) or taskset.toolsets(taskset.config):
        raise ConfigError(
            f"environment: verifiers:{name} has tools or a container, which run beside the package's own harness; tasks of one "
            "message are supported, and environments of verifiers 0.1 with tools"
        )
    tasks = list(taskset)
    rows = [{"prompt": _prompt_of(task.data), "number": number} for number, task in enumerate(tasks)]
    loop = _Loop()
    return Environments(lambda: _SingleEnvironment(v1, tasks, loop), rows)


def _prompt_of(data: Any) -> list[dict[str, Any]]:
    """A task's messages, as rows of data have them."""
    prompt = data.prompt
    if prompt is None:
        raise ConfigError(f"environment: task {data.idx} has no prompt: its user speaks first, which is not supported")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(_plain(one)) for one in prompt]
    return [{"role": "system", "content": data.system_prompt}, *messages] if data.system_prompt else messages


class _SingleEnvironment:
    """One task at a time, answered by one message and judged by the task."""

    waits = True
    tools: Sequence[Tool] = ()

    def __init__(self, v1: Any, tasks: Sequence[Any], loop: _Loop) -> None:
        self._v1 = v1
        self._tasks = tasks
        self._loop = loop
        self._task: Any = None

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        self._task = self._tasks[task["number"]]
        return [message_from(message) for message in _prompt_of(self._task.data)]

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        return StepResult(float(self._loop.run(self._judged(conversation.messages[-1], end))))

    async def _judged(self, message: Message, end: EndReason) -> float:
        from verifiers.v1.graph import prepare_turn
        from verifiers.v1.trace import AgentInfo, TraceTask
        from verifiers.v1.types import AssistantMessage, Response, SystemMessage, UserMessage

        task, kinds = self._task, {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
        row = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        trace = self._v1.Trace(task=row, agent=AgentInfo(config=self._v1.AgentConfig(model="policy")))
        prompt = [kinds[one["role"]](content=one["content"]) for one in _prompt_of(task.data)]
        answered = AssistantMessage(content=message.text, reasoning_content=message.thinking or None)
        reason = "length" if end == "length" else "stop"
        response = Response(id="policy", created=0, model="policy", message=answered, finish_reason=reason)
        await task.setup(trace, None)
        prepare_turn(trace, prompt).commit(response)
        await task.finalize(trace, None)
        await task.score(trace)
        reward: float = trace.reward
        return reward
