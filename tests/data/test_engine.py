"""The same documents wherever and however they are worked on, and after any number of kills."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest

from bessemer.core.errors import SourceError, StorageError
from bessemer.core.hashing import hash_files
from bessemer.data.engine import Engine, load_daft, run_tasks
from tests.cases import slow

STAGES = """
import json, os, sys
from pathlib import Path
from bessemer.data.stages.clean import clean
from bessemer.data.stages.collect import collect
from bessemer.data.config import CleanConfig, CollectConfig, DeduplicateConfig, SelectConfig
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.select import select

def main(source, out, where, stages=4):
    root = Path(out)
    collected = lambda config, _, folder: collect(config, folder, cache=root)
    all_stages = [
        (collected, CollectConfig, {"sources": [{"source": "files", "paths": source}]}),
        (clean, CleanConfig, {"edit": ["repair", "pii"], "score": ["language", "gopher_quality", "gopher_repetition"]}),
        (deduplicate, DeduplicateConfig, {"methods": ["exact", "minhash", "lines"]}),
        (select, SelectConfig, {"languages": [], "thresholds": {"gopher_mean_word_length": {"min": 4.4}}}),
    ]
    before = None
    for number, (stage, kind, settings) in enumerate(all_stages[:stages]):
        done = root / f"{number}.json"
        folder = root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        if not done.exists():
            metrics = stage(kind.parse({**settings, **where}), before, folder)
            done.write_text(json.dumps(metrics, sort_keys=True))
        before = folder / "documents"

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "stages.py"
    path.write_text(STAGES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """600 records in 7 files, with copies, near copies, lines in common and addresses."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(3)
    words = [
        f"{a}{b}"
        for a in ("st", "m", "f", "bl", "h", "cr")
        for b in ("eel", "elt", "ire", "ast", "eat", "ucible", "and", "the")
    ]
    records = []
    for number in range(600):
        if number % 5 == 4:
            text = records[draw.randrange(len(records))]["text"]  # a copy
        else:
            sentence = " ".join(draw.choice([*words, "the", "of", "and", "to"]) for _ in range(90)) + "."
            text = f"{sentence}\n\nThis line stands in many documents of the corpus.\n\nWrite to someone{number}@furnace.org."
        records.append({"id": number, "text": text})
    for index in range(7):
        lines = [json.dumps(record) + "\n" for record in records[index::7]]
        (folder / f"{index}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def start(script, corpus, out, where=None):
    """The stages in a process of their own."""
    environment = os.environ | {"PYTHONHASHSEED": "random"}
    return subprocess.Popen([sys.executable, script, corpus, out, json.dumps(where or {})], env=environment)


@pytest.fixture(scope="module")
def run(script, corpus):
    """Makes documents by the first stages, in this process and in those that it starts."""
    return partial(runpy.run_path(str(script))["main"], str(corpus))


def bytes_of(out, stages=4):
    return hash_files(out, [path for number in range(stages) for path in (out / str(number)).rglob("*.parquet")])


@pytest.fixture(scope="module")
def threaded(run, tmp_path_factory):
    """The folder of a run in threads."""
    out = tmp_path_factory.mktemp("threads") / "out"
    run(out, {})
    metrics = json.loads((out / "3.json").read_text(encoding="utf-8"))
    assert 100 < metrics["documents_out"] < 600
    return out


@pytest.fixture(scope="module")
def expected(threaded):
    return bytes_of(threaded)


@pytest.mark.parametrize("finished, stages", [(1, 2), (0, 4)])
@pytest.mark.slow
def test_processes_give_the_bytes_that_threads_give(run, threaded, tmp_path, finished, stages):
    """finished: stages that threads did before."""
    for number in range(finished):
        shutil.copytree(threaded / str(number), tmp_path / str(number))
        shutil.copy(threaded / f"{number}.json", tmp_path)
    run(tmp_path, {"processes": True}, stages)
    assert bytes_of(tmp_path, stages) == bytes_of(threaded, stages)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_bytes_that_threads_give(script, corpus, expected, tmp_path):
    pytest.importorskip("ray")
    assert start(script, corpus, tmp_path, {"engine": "ray"}).wait() == 0
    assert bytes_of(tmp_path) == expected


@pytest.mark.slow
def test_one_core_gives_the_bytes_that_all_give(script, corpus, expected, tmp_path):
    command = ["taskset", "-c", "0", sys.executable, script, corpus, tmp_path, "{}"]
    subprocess.run(command, check=True)
    assert bytes_of(tmp_path) == expected


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_documents_are_the_same(script, corpus, expected, tmp_path):
    draw, killed = random.Random(11), 0
    started = time.monotonic()
    assert start(script, corpus, tmp_path / "timed").wait() == 0
    whole = time.monotonic() - started
    while True:
        process = start(script, corpus, tmp_path / "out")
        try:
            process.wait(timeout=draw.uniform(0.3, 1.0) * whole if killed < 10 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert process.returncode == 0
        if killed >= 10:
            break
        for path in (tmp_path / "out").glob("*.json"):  # it came through: once more from some stage on
            if int(path.stem) >= draw.randrange(4):
                path.unlink()
    assert bytes_of(tmp_path / "out") == expected


def test_every_task_runs_once_and_answers_by_its_number():
    assert sorted(run_tasks(lambda task: task * 2, [5, 6, 7])) == [(0, 10), (1, 12), (2, 14)]
    assert list(run_tasks(lambda task: task, [])) == []


@pytest.mark.parametrize("processes", [False, True])
def test_a_users_mistake_comes_back_as_it_was(processes):
    def fail(task):
        raise SourceError(f"no {task}")

    with pytest.raises(SourceError, match="no 7"):
        list(run_tasks(fail, [7], Engine(processes=processes)))


def test_telemetry_is_off_before_the_engine_loads():
    load_daft()
    assert os.environ["DAFT_ANALYTICS_ENABLED"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_nothing_else_is_loaded_for_a_recipe_to_be_checked():
    code = textwrap.dedent(
        """
        import sys
        from bessemer.data.config import SelectConfig
        SelectConfig.parse({"keep": ["gopher", "fineweb"]}).limits()
        assert not {"daft", "numba", "pyarrow", "torch"} & set(sys.modules), sorted(sys.modules)
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True)


#: A command whose tasks begin and do not end; each leaves a file.
WAITING = """
import os, signal, sys, time
from pathlib import Path
from bessemer.cli import main as cli
from bessemer.data.engine import Engine, run_tasks

# ignored in what a script starts in the background, as these tests may be
signal.signal(signal.SIGINT, signal.default_int_handler)

def begin(number, folder=sys.argv[1]):
    Path(folder, str(number)).touch()
    if number:
        time.sleep(600)
    return number

@cli.app.command("wait")
def wait():
    for number, _ in run_tasks(begin, range(8), Engine(processes=sys.argv[2] == "processes")):
        Path(sys.argv[1], "first").touch()

cli.main(["wait"])
"""


@pytest.mark.parametrize("where", ["threads", slow("processes")])
def test_one_ctrl_c_ends_a_data_stage_with_one_line(tmp_path, where):
    (tmp_path / "waiting.py").write_text(WAITING, encoding="utf-8")
    begun = tmp_path / "begun"
    begun.mkdir()
    command = [sys.executable, str(tmp_path / "waiting.py"), str(begun), where]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", start_new_session=True
    ) as waiting:
        try:
            end = time.monotonic() + 300
            while not {"first", "1"} <= {path.name for path in begun.iterdir()}:
                assert waiting.poll() is None, waiting.stdout.read()
                assert time.monotonic() < end, "its tasks did not begin"
                time.sleep(0.02)
            # as a terminal does, to all of them
            os.killpg(waiting.pid, signal.SIGINT)
            said, _ = waiting.communicate(timeout=60)
        finally:
            waiting.kill()
    assert (waiting.returncode, said) == (130, "\nstopped; the same command goes on from here\n")


def test_tasks_that_have_not_begun_are_left_out_when_one_fails(tmp_path):
    def work(number):
        (tmp_path / str(number)).touch()
        raise SourceError("the first is not usable")

    with pytest.raises(SourceError, match="the first"):
        list(run_tasks(work, range(500)))
    assert len(list(tmp_path.iterdir())) < 500


def test_a_full_disk_in_a_task_is_told_as_one(tmp_path):
    def work(number):
        raise OSError(28, "No space left on device", f"part-{number}")

    with pytest.raises(StorageError, match="the disk is full while writing to part-0;"):
        list(run_tasks(work, [0]))
