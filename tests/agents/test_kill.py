"""`kill -9` at every moment of a task with side effects, and what is there after it was resumed."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from bessemer.agents.journal import Journal, read_records
from bessemer.agents.loop import AgentTool
from bessemer.agents.toolbox import Folder
from bessemer.assistant.tools import Tool
from tests.agents.scripted import StepModel, agent_of, begin, ended
from tests.cases import slow

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")


class Bomb:
    """Kills this process, as `kill -9` does, when `passed` is called for the n-th time."""

    def __init__(self, after):
        self.left = after

    def passed(self):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class WatchedJournal(Journal):
    """Passes the bomb before and after each record."""

    bomb = Bomb(10**9)

    def write(self, event, **values):
        self.bomb.passed()
        super().write(event, **values)
        self.bomb.passed()


def in_child(work, *arguments):
    """Whether work in a process of its own came to its end; False where the process was killed."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status == 0


def work(folder, model, tools, bomb):
    """Begin the task of a folder, or resume it."""
    WatchedJournal.bomb = bomb
    if not (folder / "journal.jsonl").exists():
        with begin(folder):
            pass
    with WatchedJournal.resume(folder) as journal:
        ended(agent_of(model, [watched(tool, bomb) for tool in tools], journal))


def work_on_files(folder, place, after=10**9):
    """The task of five steps. after: moments until the process is killed."""
    work(folder, FIVE_STEPS, Folder(place).tools(), Bomb(after))


def watched(tool, bomb):
    """The tool, which passes the bomb when it has taken effect."""
    function = tool.tool.function

    def call(**arguments):
        result = function(**arguments)
        bomb.passed()
        return result

    same = Tool(tool.tool.name, tool.tool.description, tool.tool.parameters, call)
    return AgentTool(same, tool.is_repeatable, tool.note, tool.recover)


FIVE_STEPS = StepModel(
    ("append_file", {"name": "log", "text": "one\n"}),
    ("write_file", {"name": "count", "text": "count: 1\n"}),
    ("append_file", {"name": "log", "text": "two\n"}),
    ("edit_file", {"name": "count", "old": "count: 1", "new": "count: 11"}),
    ("append_file", {"name": "log", "text": "two\n"}),
    "Done.",
)
DONE = {"log": "one\ntwo\ntwo\n", "count": "count: 11\n"}


def files(place):
    return {path.name: path.read_text(encoding="utf-8") for path in place.iterdir()}


# a step has seven moments, so that every fifth of the task's is each of the seven in turn
@pytest.mark.parametrize("stride", [5, slow(1)])
def test_each_of_five_effects_happens_once_wherever_the_process_is_killed(tmp_path, stride):
    """Before and after each record, and between each effect and its record."""
    (tmp_path / "files").mkdir()
    # in this process: what is loaded when it is first needed, children have then
    work_on_files(tmp_path / "task", tmp_path / "files")
    assert files(tmp_path / "files") == DONE
    moments = 0
    while True:
        place, folder = tmp_path / f"files{moments}", tmp_path / f"task{moments}"
        place.mkdir()
        if in_child(work_on_files, folder, place, moments):
            break
        assert in_child(work_on_files, folder, place)
        assert files(place) == DONE, f"killed at moment {moments}"
        moments += stride
    # 6 messages, 5 begun, 5 done and the end, before and after; and 5 effects
    assert 0 <= moments - (2 * 17 + 5) < stride


def test_a_task_that_is_killed_again_and_again_comes_to_its_end(tmp_path):
    place, folder = tmp_path / "files", tmp_path / "task"
    place.mkdir()
    lives = 0
    while not in_child(work_on_files, folder, place, 4):
        lives += 1
        assert lives < 30
    assert files(place) == DONE and lives > 3


def send_a_mail(folder, sent, after=10**9):
    def send(to):
        with sent.open("a", encoding="utf-8") as file:
            file.write(f"{to}\n")

    schema = {"type": "object", "properties": {"to": {"type": "string"}}}
    model = StepModel(("send", {"to": "anna"}), "Done.")
    work(folder, model, [AgentTool(Tool("send", "Sends.", schema, send))], Bomb(after))


def test_an_effect_that_nobody_can_check_happens_at_most_once_and_the_assistant_is_told(tmp_path):
    for moment in range(11):
        sent, folder = tmp_path / f"sent{moment}", tmp_path / f"task{moment}"
        in_child(send_a_mail, folder, sent, moment)
        assert in_child(send_a_mail, folder, sent)
        records, _ = read_records(folder)
        (done,) = [record for record in records if record["event"] == "done"]
        count = len(sent.read_text(encoding="utf-8").splitlines()) if sent.exists() else 0
        # from the record that it begins to the record of its result, nobody knows
        if done["how"] == "unknown":
            assert count <= 1 and "nobody knows whether it took effect" in done["text"] and moment in (3, 4, 5)
        else:
            assert count == 1


def test_a_text_that_was_added_in_part_is_added_whole(tmp_path):
    (tool,) = [tool for tool in Folder(tmp_path).tools() if tool.tool.name == "append_file"]
    arguments = {"name": "log", "text": "second\n"}
    (tmp_path / "log").write_text("first\n", encoding="utf-8")
    note = tool.note(arguments)
    (tmp_path / "log").write_text("first\nsec", encoding="utf-8")
    assert tool.recover(arguments, note) is None and (tmp_path / "log").read_text(encoding="utf-8") == "first\n"
    (tmp_path / "log").write_text("first\nother", encoding="utf-8")
    assert "changed by somebody else" in tool.recover(arguments, note).text
