"""Prompts to be sampled for: rows of files, and questions of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.records import TABLES, is_table
from bessemer.posttraining.data.encoding import encode_prompt
from bessemer.posttraining.data.examples import read_examples
from bessemer.posttraining.data.formats import Turns
from bessemer.posttraining.data.splitting import split_examples
from bessemer.posttraining.rewards.config import AskedTask
from bessemer.posttraining.rl.config import RLConfig
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import GenerationTask
from bessemer.tasks.registry import TASKS, find_tasks
from bessemer.tokenization.chat import checked_messages
from bessemer.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What is asked. turns: messages, or a text that is continued. columns: passed to the rewards. stop: texts at which an
    answer ends. begin: whether a text begins with the begin token whatever the tokenizer does."""

    turns: Turns
    columns: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    begin: bool = False

    def encoded(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids, up to where the answer begins."""
        ids = encode_prompt(self.turns, tokenizer)
        missing = self.begin and isinstance(self.turns, str) and not tokenizer.begin_ids
        return [tokenizer.bos_id, *ids] if missing or not ids else ids

    @property
    def text(self) -> str:
        """For a reader: the text, or what each message says."""
        if isinstance(self.turns, str):
            return self.turns
        return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in self.turns)


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and held out, and the tasks by name that some are of."""

    training: Sequence[Prompt]
    held_out: Sequence[Prompt]
    tasks: Mapping[str, AskedTask]


def gather_prompts(config: RLConfig, folder: Path, seed: int) -> Prompts:
    """The prompts of all data that the settings name, each once, in order.

    Raises SourceError for rows that are malformed, ConfigError for a task that there is not or that generates nothing,
    ArtefactError for a task's data.
    """
    prompts: list[Prompt] = []
    tasks: dict[str, AskedTask] = {}
    for name in config.data:
        if is_table(name):
            prompts += read_examples(folder / name, partial(_prompt, config))
            continue
        task = _task(name, config, folder)
        if task.name in tasks:
            raise ConfigError(f"data: two tasks have the name {task.name!r}; name each once")
        questions = list(task.questions())
        tasks[task.name] = AskedTask(task, {question.item: question for question in questions})
        for question in questions:
            turns: Turns = question.context if isinstance(question.context, str) else tuple(map(dict, question.context))
            columns = {"task": task.name, "item": question.item}
            prompts.append(Prompt(turns, columns, task.generation.stop, task.begin_token))
    training, held_out = split_examples(prompts, _whole, config.validation_share, seed)
    return Prompts(training, held_out, tasks)


def _task(name: str, config: RLConfig, folder: Path) -> GenerationTask:
    is_file = name.endswith((".yaml", ".yml"))
    data = None if config.tasks_folder is None else folder / config.tasks_folder
    if not is_file and name not in TASKS:
        raise ConfigError(f"data: {name!r} is neither a file of {', '.join(TABLES)} nor a task; there are {', '.join(TASKS)}")
    options = TaskOptions(data=data, chat=config.chat or None, system=config.system)
    (task,) = find_tasks([str(folder / name) if is_file else name], options)
    if not isinstance(task, GenerationTask):
        raise ConfigError(f"data: the task {task.name} is asked by likelihood; rl needs one whose answers are generated")
    return task


def _prompt(config: RLConfig, row: Mapping[str, Any]) -> Prompt:
    """A row's prompt. Raises ValueError or RequestError, in one line."""
    given = row.get(config.prompt_column)
    columns = {name: value for name, value in row.items() if name != config.prompt_column}
    if isinstance(given, str) and given.strip():
        if not config.chat:
            return Prompt(given, columns)
        given = [{"role": "user", "content": given}]
    elif not isinstance(given, list) or not given:
        raise ValueError(f"needs messages or a text under {config.prompt_column!r}; it has {given!r}"[:200])
    if config.system is not None and not _begins_with_system(given):
        given = [{"role": "system", "content": config.system}, *given]
    messages = checked_messages(given, first=1)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{config.prompt_column}: the prompt ends with the assistant, whose turn it is to answer")
    return Prompt(tuple(messages), columns)


def _begins_with_system(messages: Sequence[Any]) -> bool:
    return isinstance(messages[0], Mapping) and messages[0].get("role") == "system"


def _whole(prompt: Prompt) -> str:
    """All of a prompt, and not its opening: that may be an example which every question of a task has before it."""
    if isinstance(prompt.turns, str):
        return prompt.turns
    return "\n".join(str(one.get("content") or "") for one in prompt.turns)
