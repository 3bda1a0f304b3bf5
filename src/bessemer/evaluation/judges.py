"""Judging models of this machine, opened for the tasks that name one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine
from bessemer.tasks.judge import Ask
from bessemer.tasks.judged import JudgedTask
from bessemer.tasks.questions import Task


@contextmanager
def connected_judges(tasks: Sequence[Task], device: str = "auto") -> Iterator[None]:
    """While entered, the tasks' judges that have no URL are open; a model that judges several tasks is opened once.

    Raises ArtefactError for a folder without a model.
    """
    with ExitStack() as stack:
        opened: dict[str, Engine] = {}
        for task in tasks:
            if isinstance(task, JudgedTask) and task.needs_judge:
                judge = task.judge_config
                if judge.model not in opened:
                    opened[judge.model] = stack.enter_context(Engine(Path(judge.model), device=device))
                task.connect(engine_judge(opened[judge.model], judge.max_tokens))
        yield


def engine_judge(engine: Engine, max_tokens: int = 512) -> Ask:
    """A judge of an engine: each prompt is what the user says, the answer is greedy.

    A prompt that the context does not hold is answered by nothing, from which no verdict can be read.
    """
    return EngineChat(engine, max_tokens=max_tokens).ask
