"""Tasks asked of a model between two steps of its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.evaluation.task_prompts import PromptEncoder
from bessemer.evaluation.tasks import score_tasks
from bessemer.inference.engine import Engine
from bessemer.tasks.options import TaskOptions
from bessemer.tasks.questions import GenerationQuestion, LikelihoodQuestion, Task
from bessemer.tasks.registry import find_tasks
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer


class TaskScores:
    """Some tasks with their data, for one model that changes. It keeps nothing of an evaluation: the engine with its KV cache
    lives as long as one does, and the memory is training's again."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._tokenizer: Tokenizer | None = None

    def check(self, tokenizer: Path, context_length: int) -> None:
        """Raise ConfigError when a task's prompts cannot be written with the tokenizer of a folder."""
        for task in self._tasks:
            encoder = PromptEncoder(self._load(tokenizer), context_length, task.begin_token)
            question = next(iter(task.questions()))
            try:
                if isinstance(question, GenerationQuestion):
                    encoder.prompt(question.context, 1)
                elif isinstance(question, LikelihoodQuestion):
                    encoder.part(question.parts[0])
            except BessemerError as error:
                raise ConfigError(f"tasks: {task.name}: {error}") from None

    def accuracies(self, model: Any, tokenizer: Path) -> dict[str, float]:
        """Accuracy by task of a decoder with its present weights, in evaluation mode."""
        device = model.head_weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            results = score_tasks(Engine(model, self._load(tokenizer)), self._tasks)
        return {name: float(figures["accuracy"]) for name, figures in results.items()}

    def _load(self, folder: Path) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer


def open_tasks(names: Sequence[str], data: Path | None, limit: int) -> TaskScores:
    """Tasks by name or file, their first `limit` items. Raises as `find_tasks`."""
    return TaskScores(find_tasks(names, TaskOptions(data=data, limit=limit)))
