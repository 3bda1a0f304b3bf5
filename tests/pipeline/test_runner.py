import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bessemer.core.environment import install_extra
from bessemer.core.errors import ArtefactError, SourceError, StorageError
from bessemer.core.store import Store, follow
from bessemer.pipeline import recipe as recipe_module
from bessemer.pipeline.api import execute, prepare, run
from bessemer.pipeline.launch import Ranks
from bessemer.pipeline.run_folder import RunFolder, linked_keys
from bessemer.pipeline.stage_maker import _less

from .conftest import TrainConfig


class Said:
    """A progress that keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def task(self, description, total=None, unit="", completed=0):
        raise AssertionError("these stages report no progress")


def go(file, overrides=(), **options):
    until, only = options.pop("until", None), options.pop("only", None)
    runner = prepare(file, overrides, **options)
    return execute(runner, until=until, only=only, ranks=options.get("ranks"))


def actions(name, overrides=(), **options):
    return {one.stage.name: one.action for one in prepare(name, overrides, **options).plan()}


def test_everything_runs_once_and_is_then_reused(recipe, calls):
    go(recipe())
    assert calls == ["words", "count", "resolve", "train", "from 0"]
    result = go(recipe())
    assert len(calls) == 5
    assert all(one.reused for one in result.made)


def test_a_changed_setting_reruns_exactly_what_depends_on_it(recipe, calls):
    go(recipe())
    calls.clear()
    go(recipe("words: [a, b, c]\ncount: {times: 3}\ntrain: {minutes: 0.05}\n"))
    assert calls == ["count", "resolve", "train", "from 0"]


def test_a_stage_that_runs_at_another_pace_than_was_measured_is_measured_again_and_started_anew(recipe, calls):
    calls.speed = 3
    progress = Said()
    result = go(recipe(), progress=progress)
    assert calls == ["words", "count", "resolve", "train", "from 0", "resolve", "train", "from 0"]
    assert (follow(result.folder / "model") / "weights.txt").read_text(encoding="utf-8").split()[
        0
    ] == "15"  # 0.05 minutes at three times the speed
    assert "train: a step takes 3 times less; measured again" in progress.lines
    store = result.folder.parent / ".store"
    assert not list(store.glob("*.partial"))
    calls.clear()
    assert all(one.reused for one in go(recipe()).made) and calls == []
    assert go(recipe(), name="elsewhere").made[-1].reused and calls == []


def test_a_measurement_of_an_earlier_run_is_not_doubted(recipe, calls):
    calls.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        go(recipe())
    calls.speed = 3
    go(recipe())
    assert calls.count("resolve") == 1


def test_settings_that_cannot_change_the_output_are_as_asked_now_in_what_was_measured_before(recipe, calls):
    calls.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        go(recipe())
    go(recipe(), ["train.rows=4"])
    assert calls.rows == [1, 4] and calls.count("resolve") == 1


def test_a_setting_that_cannot_change_the_output_reruns_nothing(recipe, calls):
    go(recipe())
    calls.clear()
    go(recipe(), ["words.workers=8"])
    assert calls == []


def test_the_seed_reruns_only_stages_that_use_it(recipe, calls):
    go(recipe())
    calls.clear()
    go(recipe(), ["seed=5"])
    assert calls == ["resolve", "train", "from 0"]


def test_a_raised_stage_version_reruns_it(recipe, calls, monkeypatch):
    go(recipe())
    calls.clear()
    monkeypatch.setitem(recipe_module.STAGES, "count", replace(recipe_module.STAGES["count"], version=2))
    assert {one.stage.name: one.why for one in prepare(recipe()).plan()}["count"] == "its code changed (version 1 → 2)"
    go(recipe())
    assert calls[0] == "count"


def test_an_edited_user_function_reruns_its_stage(recipe, calls, folder):
    (folder / "mine.py").write_text("def f(): return 1\n", encoding="utf-8")
    name = recipe("words: [a]\ncount: {function: 'mine.py:f'}\n")
    go(name, allow_code=True)
    (folder / "mine.py").write_text("def f(): return 2\n", encoding="utf-8")
    calls.clear()
    assert {one.stage.name: one.why for one in prepare(name, allow_code=True).plan()}["count"] == "your code in it changed"
    go(name, allow_code=True)
    assert calls == ["count"]


def test_dry_run_says_what_and_why_and_writes_nothing(recipe, calls, folder):
    before = sorted(folder.rglob("*"))
    plan = prepare(recipe()).plan()
    assert [(one.action, one.why) for one in plan] == [
        ("run", "not made yet"),
        ("run", "not made yet"),
        ("run", "its size is measured on this machine when it starts"),
    ]
    assert calls == []
    assert sorted(path for path in folder.rglob("*") if path.name != "recipe.yaml") == before
    go(recipe())
    text = "words: [a, b, c]\ncount: {times: 9}\ntrain: {minutes: 0.05}\n"
    plan = prepare(recipe(text)).plan()
    assert [(one.action, one.why) for one in plan][:2] == [
        ("reuse", "finished earlier, nothing that it depends on has changed"),
        ("run", "times 2 → 9"),
    ]


def test_minutes_are_measured_once_even_under_another_name(recipe, calls):
    go(recipe())
    go(recipe(), name="other")
    assert calls.count("resolve") == 1
    lock = Path("runs/small/recipe.lock.yaml").read_text(encoding="utf-8")
    assert "tokens_per_second: 5" in lock
    assert "steps: 5" in lock


def test_a_lock_file_moved_to_a_new_folder_gives_the_same_size(recipe, calls, folder):
    go(recipe())
    lock = Path("runs/small/recipe.lock.yaml").read_text(encoding="utf-8")
    other = folder / "elsewhere" / "small"
    other.mkdir(parents=True)
    (other / "recipe.lock.yaml").write_text(lock.replace("steps: 5", "steps: 4"), encoding="utf-8")
    go(recipe(), runs=folder / "elsewhere")
    assert calls.count("resolve") == 1
    assert (follow(other / "model") / "weights.txt").read_text(encoding="utf-8") == "4 0"


def test_an_interrupted_stage_goes_on_from_its_checkpoint(recipe, calls):
    calls.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        go(recipe())
    assert actions(recipe())["train"] == "resume"
    calls.clear()
    go(recipe())
    assert calls == ["train", "from 3"]


def test_a_failed_stage_leaves_nothing_half_made(recipe, calls, folder):
    with pytest.raises(SourceError, match="'bad' is not usable"):
        go(recipe("words: [bad]\n"))
    assert not [path for path in (folder / "runs" / ".store").iterdir() if path.is_dir()]


def test_a_full_disk_is_one_line_and_earlier_stages_stay(recipe, calls, monkeypatch):
    def full(work):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(recipe_module.STAGES, "count", replace(recipe_module.STAGES["count"], run=full))
    with pytest.raises(StorageError, match="the disk is full"):
        go(recipe())
    assert actions(recipe())["words"] == "reuse"


def test_a_run_goes_without_a_report_where_nothing_draws_it(recipe, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    progress = Said()
    result = go(recipe(), progress=progress)
    assert progress.lines[-1].endswith(f"this needs the package 'matplotlib': {install_extra('report')}")
    assert (result.folder / "model").exists() and not (result.folder / "report.html").exists()


def test_run_folder_links_the_artefacts(recipe, calls):
    go(recipe())
    run = Path("runs/small")
    assert (follow(run / "corpus") / "documents" / "words.txt").read_text(encoding="utf-8") == "a b c"
    assert (follow(run / "model") / "weights.txt").read_text(encoding="utf-8") == "5 0"
    assert (follow(run / "stages" / "count") / "count.txt").read_text(encoding="utf-8") == "6"


def test_the_first_run_is_called_as_its_recipe_whatever_overrides_it_has(recipe, calls):
    assert go(recipe(), ["count.times=4"]).folder.name == "small"
    assert go(recipe(), ["count.times=5"]).folder.name == "small-2"
    assert go(recipe(), ["count.times=4"]).folder.name == "small"


def test_a_run_says_its_name_at_the_start(recipe, calls, capsys):
    from bessemer.cli.main import main

    with pytest.raises(SystemExit):
        main(["run", recipe("words: [a]\n"), "words.workers=2"])
    assert capsys.readouterr().err.startswith("run small, in runs/small\n")


def test_an_override_makes_a_second_folder_and_finds_it_again(recipe, calls):
    assert go(recipe()).folder.name == "small"
    assert go(recipe(), ["count.times=4"]).folder.name == "small-2"
    assert go(recipe(), ["count.times=5"]).folder.name == "small-3"
    assert go(recipe(), ["count.times=4"]).folder.name == "small-2"
    assert go(recipe(), ["count.times=4"], name="mine").folder.name == "mine"


def test_two_runs_with_other_overrides_at_once_take_two_folders(recipe, calls, monkeypatch):
    name, both = recipe("words: [a]\ncount: {}\n"), threading.Barrier(2)
    choose = RunFolder.choose

    def choose_at_once(*arguments, **options):
        chosen = choose(*arguments, **options)
        with contextlib.suppress(threading.BrokenBarrierError):  # where the other may not choose yet
            both.wait(0.5)
        return chosen

    monkeypatch.setattr(RunFolder, "choose", choose_at_once)
    results = {}

    def start(times):
        results[times] = run(name, [f"count.times={times}"])

    threads = [threading.Thread(target=start, args=(times,)) for times in (4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {result.folder.name for result in results.values()} == {"small", "small-2"}
    for times, result in results.items():
        assert result.run.record()["recipe"]["count"]["times"] == times
        assert (follow(result.folder / "stages" / "count") / "count.txt").read_text(encoding="utf-8") == str(times)


def test_an_artefact_is_linked_before_its_lock_is_free(recipe, calls, monkeypatch):
    link_stage, locked = RunFolder.link_stage, []

    def looking(self, made):
        locked.append(Store(self.store_root).is_locked(made.artefact.key))
        link_stage(self, made)

    monkeypatch.setattr(RunFolder, "link_stage", looking)
    go(recipe())
    go(recipe(), name="second")
    assert locked == [True] * 6


def test_until_stops_and_only_wants_its_inputs_finished(recipe, calls):
    with pytest.raises(ArtefactError, match="words is not finished yet"):
        go(recipe(), only="count")
    go(recipe(), until="words")
    assert calls == ["words"]
    go(recipe(), only="count")
    assert calls == ["words", "count"]


def test_until_keeps_the_links_of_later_stages(recipe, calls):
    go(recipe())
    go(recipe(), until="words")
    assert len(linked_keys(Path("runs"))) >= 3
    assert actions(recipe()) == {"words": "reuse", "count": "reuse", "train": "reuse"}


def test_two_runs_at_once_do_the_work_once(recipe, calls, monkeypatch):
    entered, release = threading.Event(), threading.Event()
    original = recipe_module.STAGES["words"].run

    def slow(work):
        entered.set()
        assert release.wait(30)
        return original(work)

    monkeypatch.setitem(recipe_module.STAGES, "words", replace(recipe_module.STAGES["words"], run=slow))
    name = recipe("words: [a]\n")
    first = threading.Thread(target=go, args=(name,))
    first.start()
    assert entered.wait(30)

    class Releasing(Said):
        def say(self, line):
            super().say(line)
            if "waiting for it" in line:
                release.set()

    said = Releasing()
    go(name, progress=said)
    first.join(30)
    assert calls == ["words"]
    assert said.lines == ["words: another run is making the same thing; waiting for it", "words: reused, the other run made it"]


def test_other_ranks_wait_for_what_rank_0_publishes(recipe, calls, monkeypatch):
    # a stage that trains is made by all ranks together: tests/pipeline/test_launch.py
    monkeypatch.setitem(recipe_module.STAGES, "train", replace(recipe_module.STAGES["train"], trains=False))
    name = recipe()
    results = {}

    def follower():
        results["follower"] = go(name, ranks=Ranks(1, 2))

    thread = threading.Thread(target=follower, daemon=True)
    thread.start()
    go(name, ranks=Ranks(0, 2))
    thread.join(60)
    assert calls.count("words") == calls.count("train") == calls.count("resolve") == 1
    assert [one.artefact.key for one in results["follower"].made] == [one.artefact.key for one in go(name).made]


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2")])
def test_a_rank_that_makes_no_sense_is_refused(rank, world):
    from bessemer.core.errors import ConfigError

    with pytest.raises(ConfigError, match="which is no rank"):
        Ranks.from_environment({"RANK": rank, "WORLD_SIZE": world})


_KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from bessemer.pipeline import recipe as recipe_module
from bessemer.core.stage import StageSpec
from bessemer.pipeline.api import execute, prepare
from tests.pipeline.conftest import WordsConfig

def words(work):
    (work.out / "half.txt").write_text("half")
    if len(sys.argv) > 1:
        print("ready", flush=True)
        time.sleep(60)
    assert not (work.out / "checkpoints").exists()
    (work.out / "half.txt").write_text("whole")
    return {{}}

makes, links = {{"documents": "."}}, {{"corpus": "."}}
recipe_module.STAGES = {{"words": StageSpec("words", "Write words.", WordsConfig, 1, {{}}, makes, words, links)}}
execute(prepare("recipe.yaml"))
print(Path("runs/small/corpus/half.txt").read_text())
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_killed_run_never_shows_a_half_made_artefact(recipe, folder):
    recipe("words: [a]\n")
    script = folder / "go.py"
    script.write_text(_KILLED.format(tests=str(Path(__file__).parents[2])), encoding="utf-8")
    killed = subprocess.Popen([sys.executable, script, "slow"], stdout=subprocess.PIPE, encoding="utf-8")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "ready\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "runs" / "small" / "corpus").exists()
    again = subprocess.run([sys.executable, script], capture_output=True, encoding="utf-8", check=True)
    assert again.stdout == "whole\n"


def test_a_second_measurement_has_less_time_for_what_the_first_has_spent():
    config = TrainConfig(minutes=4.0)
    assert _less(config, None) is config and _less(config, 0.2) is config
    assert _less(config, 60.0).minutes == 3.0
    assert _less(config, 600.0).minutes == 1.0
    assert _less(TrainConfig(steps=3), 60.0).steps == 3
