"""CORE of DataComp-LM (Li et al. 2024, 2406.11794) over whichever of its tasks are at hand.

A task's accuracy is centred, so that guessing is 0 and all right is 1, and CORE is the mean. Over n of the 22 tasks it is
CORE-n. Two values compare only for the same tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.tasks.downloads import CLONE
from bessemer.tasks.file import with_options
from bessemer.tasks.file_task import find_data
from bessemer.tasks.kinds import KINDS
from bessemer.tasks.options import TaskOptions
from bessemer.tasks.questions import Task

#: The name of the group.
CORE = "core"

_ANSWER = "\nAnswer: "


class _CoreTask(NamedTuple):
    """A task of CORE. baseline: accuracy of guessing in percent."""

    name: str
    kind: str
    data: str
    shots: int
    baseline: float
    joiner: str = " "


_TASKS = (
    _CoreTask("hellaswag_zeroshot", "choice", "hellaswag.jsonl", 0, 25),
    _CoreTask("jeopardy", "cloze", "jeopardy_all.jsonl", 10, 0, _ANSWER),
    _CoreTask("bigbench_qa_wikidata", "cloze", "bigbench_qa_wikidata.jsonl", 10, 0),
    _CoreTask("arc_easy", "choice", "arc_easy.jsonl", 10, 25, _ANSWER),
    _CoreTask("arc_challenge", "choice", "arc_challenge.jsonl", 10, 25, _ANSWER),
    _CoreTask("copa", "choice", "copa.jsonl", 0, 50),
    _CoreTask("commonsense_qa", "choice", "commonsense_qa.jsonl", 10, 20),
    _CoreTask("piqa", "choice", "piqa.jsonl", 10, 50, _ANSWER),
    _CoreTask("openbook_qa", "choice", "openbook_qa.jsonl", 0, 25),
    _CoreTask("lambada_openai", "cloze", "lambada_openai.jsonl", 0, 0),
    _CoreTask("hellaswag", "choice", "hellaswag.jsonl", 10, 25),
    _CoreTask("winograd", "schema", "winograd_wsc.jsonl", 0, 50),
    _CoreTask("winogrande", "schema", "winogrande.jsonl", 0, 50),
    _CoreTask("bigbench_dyck_languages", "cloze", "bigbench_dyck_languages.jsonl", 10, 0),
    _CoreTask("agi_eval_lsat_ar", "choice", "agi_eval_lsat_ar.jsonl", 3, 20),
    _CoreTask("bigbench_cs_algorithms", "cloze", "bigbench_cs_algorithms.jsonl", 10, 0),
    _CoreTask("bigbench_operators", "cloze", "bigbench_operators.jsonl", 10, 0),
    _CoreTask("bigbench_repeat_copy_logic", "cloze", "bigbench_repeat_copy_logic.jsonl", 10, 0),
    _CoreTask("squad", "cloze", "squad.jsonl", 10, 0),
    _CoreTask("coqa", "cloze", "coqa.jsonl", 0, 0),
    _CoreTask("boolq", "choice", "boolq.jsonl", 10, 62, _ANSWER),
    _CoreTask("bigbench_language_identification", "choice", "bigbench_language_identification.jsonl", 10, 9.1),
)
#: The order of the items, and the first seed of the choice of examples, which grows by the item.
_SHUFFLE_SEED, _EXAMPLES_SEED = 1337, 1234


def core_tasks(options: TaskOptions) -> list[Task]:
    """The tasks of CORE whose data lies in the folder of the options, or in the folders in it.

    CORE says how its tasks are asked: of the options only the folder and `limit` are taken. Raises ConfigError for others,
    ArtefactError where there is no data of any.
    """
    fixed = options.model_dump(exclude={"data", "limit"}, exclude_none=True)
    if fixed:
        raise ConfigError(f"CORE says how its tasks are asked: leave out {', '.join(f'--{name}' for name in fixed)}")
    folders = [options.data or Path()]
    tasks: list[Task] = []
    for one in _TASKS:
        try:
            find_data(one.data, folders)
        except ArtefactError:
            continue
        values = {
            "name": f"{CORE}/{one.name}",
            "data": one.data,
            "joiner": one.joiner,
            "shots": one.shots,
            "begin_token": True,
            "example_choice": "by_item",
            "seed": _EXAMPLES_SEED,
            "shuffle_seed": _SHUFFLE_SEED,
            **({"score": "distinct_tokens"} if one.kind == "choice" else {}),
        }
        kind = KINDS[one.kind]
        task = kind.make(with_options(kind.config.parse(values, one.name), options), folders)
        task.group, task.baseline = CORE, one.baseline / 100
        tasks.append(task)
    if not tasks:
        raise ArtefactError(f"{folders[0]}: holds the data of none of CORE's tasks; {CLONE}")
    return tasks


def centred(accuracy: float, baseline: float) -> float:
    """Accuracy from 0 at the baseline to 1: (a − b) / (1 − b); below the baseline it is negative."""
    return (accuracy - baseline) / (1 - baseline)


def core_score(tasks: Sequence[tuple[Task, float]]) -> dict[str, Any]:
    """CORE-n of tasks with their accuracies: its name, n, the value, and the centred accuracy of each."""
    by_task = {task.name.removeprefix(f"{CORE}/"): centred(accuracy, task.baseline) for task, accuracy in tasks}
    return {"name": f"CORE-{len(by_task)}", "n": len(by_task), "value": fmean(by_task.values()), "centred": by_task}
