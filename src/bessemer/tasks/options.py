"""What a caller says about a task besides its name."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.config import Config, setting


class TaskOptions(Config):
    """Settings of a call, which go before those of a task. None: the task's own."""

    data: Path | None = setting(None, "folder of the tasks' data; none: beside the task file")
    shots: int | None = setting(None, "answered examples before each question", unit="examples", ge=0)
    limit: int | None = setting(None, "the first items only", unit="items", ge=1)
    samples: int | None = setting(None, "answers to each item, of tasks that generate", ge=1)
    seed: int | None = setting(None, "of the choice of examples and of samples")
    chat: bool | None = setting(None, "ask by the model's chat template")
    thinking_budget: int | None = setting(
        None, "tokens after which an answer's thinking is closed, of tasks that generate, with `chat`", unit="tokens", ge=0
    )
    system: str | None = setting(None, "system message, with `chat`")
