"""The items of a task, with their right answers, as examples of supervised tuning."""

from __future__ import annotations

from bessemer.core.errors import ConfigError
from bessemer.posttraining.config import TASK
from bessemer.posttraining.conversations import Conversation
from bessemer.tasks.options import TaskOptions
from bessemer.tasks.questions import GenerationTask
from bessemer.tasks.registry import find_tasks


def task_conversations(name: str, count: int) -> list[Conversation]:
    """The first `count` items of a task, each asked as a message of the user's and answered rightly.

    Raises ConfigError for a task that there is not, that generates nothing, or that knows no right answers.
    """
    (task,) = find_tasks([name], TaskOptions(chat=True, limit=count))
    if not isinstance(task, GenerationTask):
        raise ConfigError(f"data: the task {name} is asked by likelihood; there are no answers of it to learn")
    conversations = []
    for question in task.questions():
        answer = task.reference(question)
        if answer is None or isinstance(question.context, str):
            raise ConfigError(f"data: the task {name} knows no right answers that could be learnt")
        messages = (*map(dict, question.context), {"role": "assistant", "content": answer})
        conversations.append(Conversation.of(messages, TASK + name))
    return conversations
