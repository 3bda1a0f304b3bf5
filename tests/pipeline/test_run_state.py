"""How far a run has come, seen from beside it."""

import pytest

from bessemer.core.errors import SourceError
from bessemer.core.store import Store
from bessemer.pipeline.api import execute, prepare
from bessemer.pipeline.run_folder import WORKING, RunFolder, stage_states


def states(folder):
    return {one.name: one for one in stage_states(RunFolder(folder.parent, folder.name))}


def test_a_finished_run_is_done_and_says_what_feeds_what(recipe, calls):
    folder = execute(prepare(recipe())).folder
    found = states(folder)
    assert {name: one.status for name, one in found.items()} == {"words": "done", "count": "done", "train": "done"}
    assert [one.feeds for one in found.values()] == [(), ("words",), ("count",)]
    assert found["train"].steps == 5 and found["train"].key.startswith("train-")
    assert (found["train"].folder / "model" / "weights.txt").is_file()
    assert not (folder / WORKING).exists()


def test_the_stage_at_work_is_known_while_it_is_and_interrupted_when_nobody_is_at_it(recipe, calls):
    calls.stop_at = 3
    runner = prepare(recipe())
    with pytest.raises(KeyboardInterrupt):
        execute(runner)
    folder = runner.run_folder.folder
    found = states(folder)
    assert found["train"].status == "interrupted" and found["train"].started and found["train"].steps == 5
    assert (found["train"].folder / "checkpoints" / "step").read_text(encoding="utf-8") == "3"
    with Store(runner.run_folder.store_root).lock(found["train"].key):
        assert states(folder)["train"].status == "running"
    execute(prepare(recipe()))
    assert states(folder)["train"].status == "done"


def test_a_failure_stays_with_its_reason_and_what_hangs_on_it_waits(recipe, calls):
    execute(prepare(recipe()))
    runner = prepare(recipe("words: [a, bad]\ncount: {times: 2}\ntrain: {minutes: 0.05}\n"))
    with pytest.raises(SourceError):
        execute(runner)
    found = states(runner.run_folder.folder)
    assert found["words"].status == "failed" and found["words"].problem == "words: 'bad' is not usable"
    # what an earlier recipe made of other words is still linked, and is none of this one's
    assert [found[name].status for name in ("count", "train")] == ["waiting", "waiting"]


def test_a_recipe_of_a_package_that_is_gone_is_still_listed(recipe, calls, monkeypatch):
    runner = prepare(recipe())
    execute(runner)
    record = runner.run_folder.record()["recipe"]
    runner.run_folder.start({**record, "gone": {"kind": "sharpen"}})
    assert list(states(runner.run_folder.folder))[-1] == "gone"


def test_a_failure_that_is_over_is_forgotten(recipe, calls):
    execute(prepare(recipe()))
    runner = prepare(recipe("words: [a, bad]\ncount: {times: 2}\ntrain: {minutes: 0.05}\n"))
    with pytest.raises(SourceError):
        execute(runner)
    # the recipe as it was: everything is reused, and nothing is made
    folder = execute(prepare(recipe())).folder
    assert {one.status for one in states(folder).values()} == {"done"} and not (folder / WORKING).exists()
