"""Environments behind a server of OpenEnv: `environment: openenv:http://127.0.0.1:8000`.

Each episode is a session of its own on the server, over a WebSocket. The policy acts by its messages: the text is one field of
the action, and the observation's text is the next message. A server whose actions are calls of tools (MCP) gives its tools to
the policy; the episode then ends with a message that calls none.

Options: `action`, the field of the text, where the action's schema has several texts; `fields`, further fields of every action;
`observation`, the field of the observation that is shown, by default all that is not the reward or the end; `instructions`, a
text before the first observation; `tasks`, how many tasks there are under `data: [environment]`, one a seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.episodes import StepResult
from bessemer.assistant.messages import EndReason, Message
from bessemer.assistant.tools import Tool
from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.http_client import ApiError, HttpClient, TransientError
from bessemer.posttraining.rl.environments.registry import Environments

#: Fields of observations about the state of the episode, which the policy is not shown.
_STANDING = ("done", "reward", "metadata")
#: Number of seeds that servers accept.
_SEEDS = 2**31
#: Timeout in seconds of the requests for schemas.
_SHORT = 30.0


class OpenEnvOptions(Config):
    """The setting `environment_options` of a server of OpenEnv."""

    action: str | None = setting(None, "The action's field that gets the policy's text.")
    fields: dict[str, Any] = setting(default_factory=dict, description="Further fields of every action.")
    observation: str | None = setting(None, "The observation's field that the policy is shown.")
    instructions: str | None = setting(None, "Text before the first observation.")
    tasks: int = setting(1000, "Tasks of `data: [environment]`, one a seed.", ge=1)
    seconds: float = setting(60.0, "Longest wait for a step.", gt=0)


def openenv(name: str, options: Mapping[str, Any], max_turns: int) -> Environments:
    """The environment of a server. Raises ConfigError for a server that is not there or whose actions have no text, and
    ImportError without the package `openenv-core`."""
    from openenv.core import GenericEnvClient

    settings = OpenEnvOptions.parse(options, "environment_options")
    try:
        schema = HttpClient(name, timeout=_SHORT).get("/schema")
    except (TransientError, ApiError) as error:
        raise ConfigError(f"environment: openenv:{name} {error}; is the server running?") from None
    action = schema.get("action") if isinstance(schema, Mapping) else None
    properties = action.get("properties") if isinstance(action, Mapping) else None
    if not isinstance(properties, Mapping):
        raise ConfigError(f"environment: openenv:{name} gives no schema of its actions under /schema")
    has_tools = "tool_name" in properties
    field = None if has_tools else _text_field(properties, settings, name)
    tasks = [{"prompt": f"task {number}", "seed": number} for number in range(settings.tasks)]

    def new() -> _OpenEnvironment:
        client = GenericEnvClient(base_url=name, message_timeout_s=settings.seconds).sync()
        return _OpenEnvironment(client, settings, field)

    return Environments(new, tasks)


def _text_field(properties: Mapping[str, Any], settings: OpenEnvOptions, name: str) -> str:
    """The name of the action's field that gets the policy's text."""
    texts = [field for field, schema in properties.items() if isinstance(schema, Mapping) and schema.get("type") == "string"]
    if settings.action is not None:
        if settings.action not in properties:
            raise ConfigError(
                f"environment_options: action: the actions of {name} have no {settings.action!r}; they have "
                f"{', '.join(properties)}"
            )
        return settings.action
    if len(texts) != 1:
        raise ConfigError(
            f"environment_options: the actions of {name} have {', '.join(properties)}; say by action which of them the "
            "policy's text is"
        )
    return texts[0]


class _OpenEnvironment:
    """One session, for one episode at a time."""

    waits = True

    def __init__(self, client: Any, settings: OpenEnvOptions, field: str | None) -> None:
        """client: a synchronous client of the package. field: the action's field for the policy's text; None: actions are calls
        of tools."""
        self._client = client
        self._settings = settings
        self._field = field
        self._is_connected = False
        #: Sum of rewards of tools' calls since the last message, and whether one of them ended the episode.
        self._reward, self._done = 0.0, False
        self.tools: Sequence[Tool] = ()

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        if not self._is_connected:
            self._client.connect()
            self._is_connected = True
        # all episodes of a group begin in the same state, by the seed of their task
        own = task.get("seed")
        begin = own if isinstance(own, int) else derive_seed(0, hash_value(repr(sorted(task.items(), key=str)))) % _SEEDS
        result = self._client.reset(seed=begin)
        self._reward, self._done = 0.0, False
        if self._field is None:
            self.tools = self._offered()
        asked = None if isinstance(own, int) else _text_of(task.get("prompt"))
        parts = (self._settings.instructions, asked, self._shown(result.observation))
        return [Message.user("\n\n".join(part for part in parts if part))]

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        if self._field is None:
            # the message called no tool, or the episode is over
            return StepResult(self._reward)
        result = self._client.step({**self._settings.fields, self._field: conversation.messages[-1].text})
        reward = 0.0 if result.reward is None else float(result.reward)
        if result.done:
            return StepResult(reward)
        return StepResult(reward, [Message.user(self._shown(result.observation) or "…")])

    def close(self) -> None:
        """End the session."""
        if self._is_connected:
            self._is_connected = False
            self._client.close()

    def _offered(self) -> list[Tool]:
        result = self._client.step({"type": "list_tools"})
        return [
            Tool(
                str(tool["name"]),
                str(tool.get("description", "")),
                tool.get("input_schema") or {"type": "object"},
                self._call_of(str(tool["name"])),
                time_limit=self._settings.seconds,
            )
            for tool in result.observation.get("tools", ())
        ]

    def _call_of(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            if self._done:
                raise RuntimeError("the episode is over")
            result = self._client.step({"type": "call_tool", "tool_name": name, "arguments": arguments})
            self._reward += 0.0 if result.reward is None else float(result.reward)
            self._done = self._done or bool(result.done)
            error = result.observation.get("error")
            if error:
                raise RuntimeError(error.get("message", error) if isinstance(error, Mapping) else error)
            found = result.observation.get("result")
            return found.get("data", found) if isinstance(found, Mapping) else found

        return call

    def _shown(self, observation: Mapping[str, Any]) -> str:
        """The text of an observation for the policy."""
        if self._settings.observation is not None:
            return _text_of(observation.get(self._settings.observation))
        kept = {name: value for name, value in observation.items() if name not in _STANDING and value not in (None, "", [], {})}
        if len(kept) == 1:
            return _text_of(next(iter(kept.values())))
        return json.dumps(kept, ensure_ascii=False) if kept else ""


def _text_of(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)
