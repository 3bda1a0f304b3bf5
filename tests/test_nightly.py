"""The nightly run: every kind of check is a step, a step that hangs or fails stops no other, and the page says so."""

import datetime
import re
import sys
import tempfile
from pathlib import Path

import pytest

from tests import nightly
from tests.follow import guides
from tests.nightly import Step, page, run, steps

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")


def test_the_steps_are_targets_that_exist_and_take_less_than_six_hours():
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    peers = re.search(r"^PEERS := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    used = {step.command[1] for step in steps() if step.command[0] == "make"}
    assert used - {f"test-peer-{peer}" for peer in peers} <= targets
    assert {f"test-peer-{peer}" for peer in peers} | {"lint", "test-slow", "follow", "fuzz", "docs"} <= used
    followed = [step.command[2] for step in steps() if step.command[1] == "follow"]
    assert followed == [f"GUIDES={guide.name}" for guide in guides()] and "GUIDES=README.md" in followed
    # all but the longest examples, which come last and are begun if there is time
    assert sum(step.minutes for step in steps() if step.minutes < 45 or "examples" not in step.name) < 360
    minutes = [step.minutes for step in steps() if "examples" in step.name]
    assert minutes == sorted(minutes, key=lambda number: number >= 45)
    assert "test-nightly" in targets


def test_a_step_that_fails_and_one_that_hangs_are_told_with_their_ends(tmp_path):
    def step(name, code, minutes=1.0):
        return run(Step(name, minutes, [sys.executable, "-c", code]), tmp_path / name, "abc")

    outcomes = [
        step("well", "print('==== 3 passed in 1 s ====')"),
        step("badly", "print('a | b'); print('1 failed, 2 passed'); raise SystemExit(3)"),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", minutes=0.02),
    ]
    assert [outcome.word for outcome in outcomes] == ["passed", "FAILED (3)", "ended: too long"]
    text = page(outcomes, datetime.date(2026, 12, 1))
    assert "Commit abc; 2 of 3 steps failed" in text and "| 3 passed in 1 s |" in text
    assert "## badly\n\n```\na | b\n1 failed, 2 passed\n```" in text and "## hangs\n\n```\nbegun\n```" in text
    assert "all 1 steps passed" in page(outcomes[:1], datetime.date(2026, 12, 1))


@pytest.mark.parametrize("code", ["", "raise SystemExit(1)", "import time; time.sleep(60)"], ids=["passes", "fails", "hangs"])
@pytest.mark.parametrize("was_there", [False, True])
def test_an_environment_that_a_step_made_is_removed_after_it(tmp_path, monkeypatch, code, was_there):
    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    made = tmp_path / ".venv-peer" / "bin"
    if was_there:
        made.mkdir(parents=True)
    program = f"import os; os.makedirs({str(made)!r}, exist_ok=True); {code}"
    minutes = 0.05 if "sleep" in code else 1.0
    run(Step("peer", minutes, [sys.executable, "-c", program], ".venv-peer"), tmp_path / "log", "abc")
    assert made.exists() == was_there


def test_the_summary_is_found_before_what_libraries_say_as_they_end(tmp_path):
    code = "print('1 passed', '3 passed in 2 s', *map(str, range(40)), sep='\\n')"
    outcome = run(Step("peer", 1, [sys.executable, "-c", code]), tmp_path / "log", "abc")
    assert outcome.summary == "3 passed in 2 s" and outcome.end[1:] == [str(number) for number in range(25, 40)]


def test_the_record_names_no_folder_of_the_machine(tmp_path):
    temporary = Path(tempfile.gettempdir())
    files = [nightly.ROOT / "site", temporary / "tmp1" / "results.json", temporary / "pytest-of-me" / "pytest-1" / "test_one0"]
    outcome = run(Step("docs", 1, [sys.executable, "-c", f"print(*{list(map(str, files))})"]), tmp_path / "log", "abc")
    assert outcome.end == ["site results.json test_one0"]


def test_a_step_of_tests_that_is_ended_tells_which_failed_before(tmp_path):
    lines = ["[gw1] [  3%] FAILED tests/test_two.py::test_wrong", *["[gw0] [  4%] PASSED tests/test_one.py::test_right"] * 50]
    code = f"import time; print(*{lines}, sep='\\n', flush=True); time.sleep(60)"
    ended = run(Step("tests", 0.05, [sys.executable, "-c", code]), tmp_path / "log", "abc")
    assert ended.code is None and ended.end == [lines[0], *lines[-15:]]
    # by which pytest writes such lines
    assert '-m pytest -vv -m ""' in MAKEFILE


@pytest.fixture
def night(tmp_path, monkeypatch):
    """A function that runs steps "one" and "two" at a commit, of which those named fail, and returns (exit code, steps run)."""
    ran = []
    monkeypatch.setattr(nightly, "steps", lambda: [Step("one", 1, ["a"]), Step("two", 3, ["b"])])

    def one_night(commit, *arguments, failing=()):
        def pretended(step, log, of):
            ran.append((step.name, (tmp_path / "night.md").exists()))
            return nightly.Outcome(step, int(step.name in failing), 1.0, ["1 passed"], of)

        ran.clear()
        monkeypatch.setattr(nightly, "run", pretended)
        monkeypatch.setattr(nightly, "git_commit", lambda: commit)
        monkeypatch.setattr(sys, "argv", ["nightly", "--out", str(tmp_path / "night.md"), *arguments])
        return nightly.main(), list(ran)

    return one_night


def test_the_page_is_written_after_every_step_and_the_code_says_whether_all_passed(night, tmp_path):
    assert night("abc", failing=["two"]) == (1, [("one", False), ("two", True)])
    assert (tmp_path / "night.md").read_text(encoding="utf-8").count("| 1 passed |") == 2
    assert night("abc", "--only", "one") == (0, [])


def test_a_night_goes_on_where_it_was_interrupted_and_the_page_names_what_was_checked_when(night, tmp_path):
    page = tmp_path / "night.md"
    assert night("abc", "--only", "two", failing=["two"])[1] == [("two", False)]
    assert "Not run: one." in page.read_text(encoding="utf-8")
    # what failed is run again, and what passed is not
    assert night("abc")[1] == [("one", True), ("two", True)] and "Commit abc; all 2 steps" in page.read_text(encoding="utf-8")
    assert night("abc") == (0, []) and len(night("abc", "--anew")[1]) == 2
    # another commit, or changes that no commit names, are something else
    assert night("def", "--only", "one")[1] == [("one", True)] and "2 commits; all" in page.read_text(encoding="utf-8")
    assert len(night("def+changes")[1]) == 2 and len(night("def+changes")[1]) == 2


def test_a_step_that_would_end_too_late_is_left_to_another_night(night, tmp_path, capsys):
    assert night("abc", "--hours", "0.03") == (0, [("one", False)])
    assert "two: not begun" in capsys.readouterr().out
    assert "Not run: two." in (tmp_path / "night.md").read_text(encoding="utf-8")
    assert night("abc") == (0, [("two", True)])


def test_what_a_step_writes_is_kept_whatever_its_name(tmp_path, monkeypatch):
    step = Step("commands of docs/a page.md", 1, [sys.executable, "-c", "print('3 of 3 commands')"])
    monkeypatch.setattr(nightly, "steps", lambda: [step])
    monkeypatch.setattr(sys, "argv", ["nightly", "--out", str(tmp_path / "night.md")])
    assert nightly.main() == 0
    assert (tmp_path / "night" / step.log).read_text(encoding="utf-8") == "3 of 3 commands\n"


def test_the_record_can_be_kept_on_another_machine(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    step = Step("one", 1, [sys.executable, "-c", f"print('1 passed, one in', {str(checkout / 'tests')!r})"])
    monkeypatch.setattr(nightly, "ROOT", checkout)
    monkeypatch.setattr(nightly, "steps", lambda: [step])
    monkeypatch.setattr(sys, "argv", ["nightly", "--out", str(tmp_path / "night.md")])
    assert nightly.main() == 0
    record = tmp_path / "night" / "outcomes.json"
    assert "1 passed, one in tests" in record.read_text(encoding="utf-8")
    assert str(checkout) not in record.read_text(encoding="utf-8") and sys.executable not in record.read_text(encoding="utf-8")
    (kept,) = nightly.kept(record).values()
    assert (kept.step, kept.code, kept.summary) == (step, 0, "1 passed, one in tests")


def test_no_two_steps_write_to_one_file():
    logs = [step.log for step in steps()]
    assert len(set(logs)) == len(logs)
