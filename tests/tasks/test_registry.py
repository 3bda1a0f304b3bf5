import hashlib
import sys
from pathlib import Path

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.downloads import DATA_FILES
from bessemer.tasks.questions import LikelihoodTask
from bessemer.tasks.registry import _OVER_DATA, _OVER_GIVEN, _WITH_DATA, TASKS, centred, core_score, find_tasks
from tests.plugin_package import install

DATA = Path(__file__).parents[3] / "shared" / "data" / "eval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")

CODE = """
from bessemer.core.registry import Plugin
from bessemer.tasks.questions import ContinuationRequest, LikelihoodQuestion, LikelihoodTask, Outcome


class Count(LikelihoodTask):
    name = "count"

    def __init__(self, options):
        self.last = options.limit or 5

    def questions(self):
        requests = [ContinuationRequest("1 2 3 4 5"[: 2 * n + 2], (str(n + 2),)) for n in range(self.last)]
        return [LikelihoodQuestion(n, "count", (request,)) for n, request in enumerate(requests)]

    def headline(self, form):
        return "accuracy"

    def judge(self, question, scores):
        return Outcome({"accuracy": float(scores[0][0].is_greedy)})


PLUGIN = Plugin("count", "Counting", Count)
"""


@needs_data
@pytest.mark.parametrize("name", _OVER_DATA)
def test_a_shipped_task_asks_every_row_of_its_data(name):
    (task,) = find_tasks([name], TaskOptions(data=DATA))
    rows = (DATA / task._config.data).read_text(encoding="utf-8").splitlines()
    questions = task.questions()
    assert len(questions) == len(rows) and task.name == name
    # asking is not guessing: no question shows two line breaks before the answer
    contexts = [question.parts[0].context if isinstance(task, LikelihoodTask) else question.context for question in questions]
    assert not any(context.rstrip(" ").endswith("\n\nAnswer:") for context in contexts)


@needs_data
@pytest.mark.parametrize("name", DATA_FILES)
def test_what_is_said_of_data_that_is_fetched_is_true_of_it(name):
    content, file = (DATA / name).read_bytes(), DATA_FILES[name]
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    assert len(content.splitlines()) == file.items


def test_every_task_file_of_the_package_is_registered():
    files = Path(sys.modules[find_tasks.__module__].__file__).parent / "files"
    assert sorted(path.stem for path in files.glob("*.yaml")) == sorted(_OVER_DATA | _OVER_GIVEN | _WITH_DATA) == sorted(TASKS)


@pytest.mark.parametrize("name", _WITH_DATA)
def test_a_task_with_data_of_its_own_needs_nothing_else(name):
    (task,) = find_tasks(name, TaskOptions(limit=9))
    questions = task.questions()
    contexts = {str(question.context if hasattr(question, "context") else question.parts[0].context) for question in questions}
    assert len({question.id for question in questions}) == 9
    # a blind model is asked the same few things of one grey picture
    assert len(contexts) == 9 or name == "drawn_pictures_blind"


def test_a_task_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "count_task", CODE, {"bessemer.tasks": {"count": "count_task:PLUGIN"}})
    (task,) = find_tasks(["count"], TaskOptions(limit=3))
    assert [question.parts[0].context for question in task.questions()] == ["1 ", "1 2 ", "1 2 3 "]
    sys.modules.pop("count_task")


def test_a_name_that_is_none_or_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no task 'arc_eazy'; did you mean 'arc_easy'\?"):
        find_tasks(["arc_eazy"])
    with pytest.raises(ConfigError, match="no task is named; there are arc_easy, "):
        find_tasks([])


# -- CORE


@needs_data
def test_core_asks_as_its_page_says():
    tasks = {task.name: task for task in find_tasks(["core"], TaskOptions(data=DATA, limit=2))}
    assert {name: (task.shots, task.baseline) for name, task in tasks.items()} == {
        "core/arc_easy": (10, 0.25),
        "core/copa": (0, 0.5),
        "core/piqa": (10, 0.5),
        "core/openbook_qa": (0, 0.25),
        "core/winograd": (0, 0.5),
    }
    (question, _) = tasks["core/arc_easy"].questions()
    *examples, asked = question.parts[0].context.split("\n\n")
    assert len(examples) == 10 and all("\nAnswer: " in example for example in examples) and asked.endswith("\nAnswer: ")
    assert tasks["core/arc_easy"].headline("cloze") == "distinct_tokens"


def test_core_is_the_mean_of_centred_accuracies():
    class Of(LikelihoodTask):
        questions = judge = headline = lambda *_: None

        def __init__(self, name, baseline):
            self.name, self.baseline = name, baseline

    assert centred(0.25, 0.25) == 0 and centred(1, 0.62) == 1 and centred(0.4, 0.5) == pytest.approx(-0.2)
    assert core_score([(Of("core/a", 0.25), 0.55), (Of("core/b", 0.0), 0.2)]) == {
        "name": "CORE-2",
        "n": 2,
        "value": pytest.approx(0.3),
        "centred": {"a": pytest.approx(0.4), "b": 0.2},
    }


def test_core_takes_no_settings_and_needs_data(tmp_path):
    with pytest.raises(ConfigError, match="leave out --shots"):
        find_tasks(["core"], TaskOptions(data=tmp_path, shots=3))
    with pytest.raises(ArtefactError, match="holds the data of none of CORE's tasks"):
        find_tasks(["core"], TaskOptions(data=tmp_path))
