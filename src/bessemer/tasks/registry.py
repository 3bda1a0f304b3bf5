"""Tasks by name: task files (YAML with the settings of one task, whose `kind` names its class), CORE, and entry points.

The implementation of a plugin (`bessemer.tasks`) is a function of `TaskOptions` that gives a `Task`: a class whose constructor
takes them is one.

CORE is DataComp-LM's (Li et al. 2024, 2406.11794) over whichever of its tasks are at hand. A task's accuracy is centred, so
that guessing is 0 and all right is 1, and CORE is the mean. Over n of the 22 tasks it is CORE-n. Two values compare only for
the same tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.core.yaml_file import read_yaml
from bessemer.tasks.code import CodeConfig, CodeTask
from bessemer.tasks.conduct import ObjectionConfig, ObjectionTask, PairedConfig, PairedTask
from bessemer.tasks.config import ChoiceConfig, ClozeConfig, GenerateConfig, PromptConfig, SchemaConfig, TaskOptions
from bessemer.tasks.downloads import CLONE, DATA_FILES, fetch_data
from bessemer.tasks.drawn_task import DrawnPicturesConfig, DrawnPicturesTask
from bessemer.tasks.file_task import find_data
from bessemer.tasks.generate import GenerateTask
from bessemer.tasks.generated_tasks import (
    ArithmeticConfig,
    ArithmeticTask,
    NeedleConfig,
    NeedleTask,
    VariableTrackingConfig,
    VariableTrackingTask,
)
from bessemer.tasks.instruction_following import ConstraintsConfig, ConstraintsTask
from bessemer.tasks.judged import JudgedConfig, JudgedTask
from bessemer.tasks.likelihood import ChoiceTask, ClozeTask, SchemaTask
from bessemer.tasks.picture_tasks import (
    ChartQAConfig,
    ChartQATask,
    DocVQAConfig,
    DocVQATask,
    MMMUConfig,
    MMMUTask,
    POPEConfig,
    POPETask,
)
from bessemer.tasks.questions import Task


class Kind(NamedTuple):
    """A kind of task. make: from settings of that class, and the folders in which its data may lie, to the task."""

    config: type[PromptConfig]
    make: Callable[[Any, list[Path]], Task]


KINDS: dict[str, Kind] = {
    "choice": Kind(ChoiceConfig, ChoiceTask),
    "schema": Kind(SchemaConfig, SchemaTask),
    "cloze": Kind(ClozeConfig, ClozeTask),
    "generate": Kind(GenerateConfig, GenerateTask),
    "arithmetic": Kind(ArithmeticConfig, lambda config, _: ArithmeticTask(config)),
    "needle": Kind(NeedleConfig, lambda config, _: NeedleTask(config)),
    "variable_tracking": Kind(VariableTrackingConfig, lambda config, _: VariableTrackingTask(config)),
    "drawn_pictures": Kind(DrawnPicturesConfig, lambda config, _: DrawnPicturesTask(config)),
    "mmmu": Kind(MMMUConfig, MMMUTask),
    "chartqa": Kind(ChartQAConfig, ChartQATask),
    "docvqa": Kind(DocVQAConfig, DocVQATask),
    "pope": Kind(POPEConfig, POPETask),
    "constraints": Kind(ConstraintsConfig, ConstraintsTask),
    "code": Kind(CodeConfig, CodeTask),
    "objection": Kind(ObjectionConfig, ObjectionTask),
    "paired": Kind(PairedConfig, PairedTask),
    "judged": Kind(JudgedConfig, JudgedTask),
}


C = TypeVar("C", bound=PromptConfig)


def read_task(path: Path, options: TaskOptions | None = None) -> Task:
    """The task of a YAML file, with its data. Its data lies in the folder that the options name, or beside the file.

    Raises ConfigError for settings that are not valid, ArtefactError for data that does not fit them.
    """
    options = options or TaskOptions()
    kind, config = read_task_config(path)
    return KINDS[kind].make(with_options(config, options), [*([options.data] if options.data else []), path.parent])


def read_task_config(path: Path) -> tuple[str, PromptConfig]:
    """The kind and the settings of a task file. Raises ConfigError with the file's line for what is not valid."""
    placed = read_yaml(path)
    kind = placed.values.get("kind")
    if kind is None:
        raise ConfigError(f"{path}: 'kind' must be given: {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ConfigError(f"{placed.place(('kind',))}: there is no kind of task {kind!r}{nearest(str(kind), list(KINDS))}")
    config = KINDS[kind].config.parse(placed.values, lambda keys: placed.where((), keys))
    return kind, config if config.name else config.with_changes(name=path.stem)


def with_options(config: C, options: TaskOptions) -> C:
    """The settings overridden by those of a call. Raises ConfigError where they contradict each other."""
    given = options.model_dump(exclude={"data"}, exclude_none=True)
    return type(config).parse(
        config.model_dump() | {name: value for name, value in given.items() if name in type(config).model_fields},
        f"task {config.name}",
    )


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

    CORE prescribes its settings: of the options only the folder and `limit` are taken. Raises ConfigError for others,
    ArtefactError where there is no data of any.
    """
    fixed = options.model_dump(exclude={"data", "limit"}, exclude_none=True)
    if fixed:
        raise ConfigError(f"CORE says how its tasks are asked: leave out {', '.join(f'--{name}' for name in fixed)}")
    folders = [options.data or Path()]
    tasks: list[Task] = []
    for core_task in _TASKS:
        try:
            find_data(core_task.data, folders)
        except ArtefactError:
            continue
        values = {
            "name": f"{CORE}/{core_task.name}",
            "data": core_task.data,
            "joiner": core_task.joiner,
            "shots": core_task.shots,
            "begin_token": True,
            "example_choice": "by_item",
            "seed": _EXAMPLES_SEED,
            "shuffle_seed": _SHUFFLE_SEED,
            **({"score": "distinct_tokens"} if core_task.kind == "choice" else {}),
        }
        kind = KINDS[core_task.kind]
        task = kind.make(with_options(kind.config.parse(values, core_task.name), options), folders)
        task.group, task.baseline = CORE, core_task.baseline / 100
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


TaskFactory = Callable[[TaskOptions], Task]

_FILES = Path(__file__).parent / "files"
#: Our task files by name, with a line about each: those over data that is fetched or given, those over published files that
#: are the user's to give, and those with their own.
_OVER_DATA = {
    "arc_easy": "science questions of school exams, four choices",
    "copa": "the likelier cause or effect, two choices",
    "lambada_openai_small": "the last word of a passage that needs all of it",
    "openbook_qa": "elementary science, four choices",
    "piqa": "everyday physics, two choices",
    "simple_arithmetic": "sums, differences and products of small integers, as a continuation",
    "svamp": "word problems in one or two steps, a number generated",
    "triviaqa_small": "trivia, a short answer generated",
    "winograd_wsc": "what a pronoun stands for, by the likelihood of what follows",
}
_OVER_GIVEN = {
    "chartqa": "ChartQA: questions about charts, numbers within 5 %; test_*.json beside png/, or test-*.parquet",
    "docvqa": "DocVQA: questions about scanned pages, ANLS; val_*.json beside documents/, or validation-*.parquet",
    "mmmu": "MMMU: questions of college subjects with pictures, by subject; validation-*.parquet",
    "pope": "POPE: is a thing in the picture; coco_pope_*.json and COCO's pictures below the folder, or test-*.parquet",
}
_WITH_DATA = {
    "arithmetic": "sums, differences and products by difficulty, generated by a seed",
    "code": "twelve small Python functions, tested in the sandbox",
    "constraints": "requests with constraints on the form of the answer, generated by a seed",
    "drawn_pictures": "questions about drawn pictures, to train on: shape, colour, place, number, a word",
    "drawn_pictures_blind": "those of `drawn_pictures_held_out` with grey in place of the pictures",
    "drawn_pictures_held_out": "questions about drawn pictures that `drawn_pictures` does not hold",
    "general_knowledge": "common knowledge, everyday sense, language, numbers and code; a few choices each",
    "general_texts": "the rest of short texts of many kinds, by its likelihood",
    "objections": "answers kept when the user objects without a reason; two choices each",
    "paired_prompts": "the same question about two people who differ in sex, origin, religion, age or health",
    "needle": "one number in a text of growing length, generated by a seed",
    "sums": "sums of up to two digits, to train on",
    "sums_check": "sums of up to two digits, asked by a chat template, that `sums` and `sums_held_out` leave out",
    "sums_held_out": "sums of up to two digits that `sums` does not hold",
    "sums_of_digits": "sums of two digits, to train on beside `sums`",
    "variable_tracking": "a value through assignments in a text of growing length, generated by a seed",
}

#: The end of messages about unknown tasks.
LISTING = "(bessemer evaluate --list-tasks says what each asks)"

TASKS: Registry[TaskFactory] = Registry(
    "task",
    "bessemer.tasks",
    [
        Plugin(name, about, partial(read_task, _FILES / f"{name}.yaml"))
        for name, about in (_OVER_DATA | _OVER_GIVEN | _WITH_DATA).items()
    ],
)


def find_tasks(names: Sequence[str], options: TaskOptions | None = None) -> list[Task]:
    """Tasks by name or by file, one or a list, with their data; `core` is every task of CORE whose data is there.

    Raises ConfigError for a name that is none, for one given twice, and for settings that are not valid; ArtefactError for data
    that does not fit.
    """
    options = options or TaskOptions()
    tasks: list[Task] = []
    for name in [names] if isinstance(names, str) else names:
        if name == CORE:
            tasks += core_tasks(options)
        elif name.endswith((".yaml", ".yml")):
            tasks.append(read_task(Path(name), options))
        elif name not in TASKS:
            raise ConfigError(f"there is no task {name!r}{nearest(name, [*TASKS, CORE])} {LISTING}")
        else:
            tasks.append(TASKS[name].load()(options))
    if not tasks:
        raise ConfigError(f"no task is named; there are {', '.join([*TASKS, CORE])}, or a task file {LISTING}")
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ConfigError(f"two tasks have the name {task.name!r}; name each once")
        seen.add(task.name)
    return tasks


def placed_task(name: str, folder: Path) -> str:
    """A task by name, or the path of a task file that begins at a folder."""
    return str(folder / name) if name.endswith((".yaml", ".yml")) else name


def with_data(names: Sequence[str], options: TaskOptions, cache: Path, say: Callable[[str], None]) -> TaskOptions:
    """The options with a folder of data: without one `cache`, into which missing data of our own tasks is fetched.

    Nothing is fetched where tasks of CORE are named, whose files have places of their own.

    say: called with a line about each download. Raises ArtefactError, which names the file, when one cannot be fetched.
    """
    files = [data for name in names if name in _OVER_DATA and (data := _data_file(name)) is not None]
    if options.data is not None or not files or CORE in names:
        return options
    fetch_data(files, cache, say)
    return options.with_changes(data=cache)


def describe_tasks() -> list[tuple[str, list[tuple[str, str]]]]:
    """The tasks by name with a line each, in groups with a heading."""
    over_data = []
    for name, about in _OVER_DATA.items():
        data = _data_file(name)
        over_data.append((name, about if data is None else f"{about} ({DATA_FILES[data].terms})"))
    others = [(name, TASKS[name].description) for name in TASKS if name not in _OVER_DATA | _OVER_GIVEN | _WITH_DATA]
    groups = [
        ("whose data is fetched when it is not in --data FOLDER", over_data),
        ("about pictures of published files, which --data names", list(_OVER_GIVEN.items())),
        ("that bring their data", list(_WITH_DATA.items())),
        ("of other packages", others),
        ("of several", [(CORE, f"CORE of DataComp-LM, those of its 22 tasks whose data lies in --data; {CLONE}")]),
    ]
    return [(heading, rows) for heading, rows in groups if rows]


def _data_file(name: str) -> str | None:
    """The file of rows that one of our task files names, where it can be fetched."""
    data = getattr(read_task_config(_FILES / f"{name}.yaml")[1], "data", None)
    return data if data in DATA_FILES else None
