"""Tasks that a model answers at intervals while it is trained. What asks them is passed in: it lies above this package."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.core.errors import ConfigError
from bessemer.core.stage import OpenTasks, TaskScorer
from bessemer.training.config import LoopConfig
from bessemer.training.monitoring.throughput import TASK

if TYPE_CHECKING:
    from bessemer.model.decoder import Decoder
    from bessemer.training.trainer import Trainer


def open_tasks(config: LoopConfig, folder: Path, opener: OpenTasks | None) -> TaskScorer | None:
    """The tasks of the settings, with their data; None where they name none. Relative paths start from `folder`.

    Raises ConfigError for a task that there is not, and where nothing asks tasks; ArtefactError for data that is missing.
    """
    if not config.tasks:
        return None
    if opener is None:
        raise ConfigError("tasks: no function that asks them was passed in; the pipeline passes one")
    names = [str(folder / name) if name.endswith((".yaml", ".yml")) else name for name in config.tasks]
    return opener(names, None if config.tasks_data is None else folder / config.tasks_data, config.tasks_limit)


def check_processes(processes: int) -> None:
    """Raise ConfigError when tasks are to be asked of a model whose weights several processes share."""
    if processes > 1:
        raise ConfigError(
            f"tasks: asked of a model in one process, and {processes} train this one; leave tasks out, and evaluate its "
            "checkpoints"
        )


class PeriodicTasks:
    """Asks the tasks at the steps that the settings name. It leaves weights, optimizers and the random state as they are."""

    def __init__(self, scorer: TaskScorer, decoder: Decoder, tokenizer: Path, steps: Collection[int]) -> None:
        """decoder: the model, which has its weights when training begins. tokenizer: the folder that holds its tokenizer.
        steps: after which the tasks are asked."""
        self._scorer = scorer
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._steps = steps

    def __call__(self, finished: int, trainer: Trainer) -> dict[str, float]:
        """Accuracies by `task/NAME` after `finished` steps; empty at most steps."""
        if finished not in self._steps:
            return {}
        from bessemer.model.trained_adapters import without_parts_beside

        decoder = without_parts_beside(self._decoder)
        with trainer.runtime.evaluating(decoder):
            accuracies = self._scorer.accuracies(decoder, self._tokenizer)
        return {f"{TASK}{name}": accuracy for name, accuracy in accuracies.items()}
