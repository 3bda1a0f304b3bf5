"""Documents to pretrain on: the sums of the task `sums` with their results, without those of `sums_held_out`."""

from collections.abc import Iterator

from bessemer.tasks.registry import find_tasks


def sums() -> Iterator[dict[str, str]]:
    """`12 + 7 = 19`, a line each."""
    (task,) = find_tasks(["sums"])
    for question in task.questions():
        yield {"id": question.context, "text": f"{question.context} {task.reference(question)}\n"}
