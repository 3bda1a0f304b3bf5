"""The nightly run: every kind of check is a step, a step that hangs or fails stops no other, and the page says so."""

import datetime
import re
import sys
from pathlib import Path

from tests import nightly
from tests.nightly import Step, page, run, steps

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")


def test_the_steps_are_targets_that_exist_and_take_less_than_six_hours():
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    peers = re.search(r"^PEERS := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    used = {step.command[1] for step in steps() if step.command[0] == "make"}
    assert used - {f"test-peer-{peer}" for peer in peers} <= targets
    assert {f"test-peer-{peer}" for peer in peers} | {"lint", "test-slow", "follow", "fuzz", "docs"} <= used
    assert sum(step.minutes for step in steps()) < 360
    assert "test-nightly" in targets


def test_a_step_that_fails_and_one_that_hangs_are_told_with_their_ends(tmp_path):
    def step(name, code, minutes=1.0):
        return run(Step(name, minutes, [sys.executable, "-c", code]), tmp_path / name)

    outcomes = [
        step("well", "print('==== 3 passed in 1 s ====')"),
        step("badly", "print('a | b'); print('1 failed, 2 passed'); raise SystemExit(3)"),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", minutes=0.02),
    ]
    assert [outcome.word for outcome in outcomes] == ["passed", "FAILED (3)", "ended: too long"]
    text = page(outcomes, "abc", datetime.date(2026, 12, 1))
    assert "Commit abc; 2 of 3 steps failed" in text and "| 3 passed in 1 s |" in text
    assert "## badly\n\n```\na | b\n1 failed, 2 passed\n```" in text and "## hangs\n\n```\nbegun\n```" in text
    assert "all 1 steps passed" in page(outcomes[:1], "abc", datetime.date(2026, 12, 1))


def test_the_page_is_written_after_every_step_and_the_code_says_whether_all_passed(tmp_path, monkeypatch):
    written = []
    out = tmp_path / "night.md"
    monkeypatch.setattr(nightly, "steps", lambda: [Step("one", 1, ["a"]), Step("two", 1, ["b"])])

    def pretended(step, log):
        written.append(out.exists())
        return nightly.Outcome(step, 0 if step.name == "one" else 1, 1.0, ["1 passed"])

    monkeypatch.setattr(nightly, "run", pretended)
    monkeypatch.setattr(sys, "argv", ["nightly", "--out", str(out)])
    assert nightly.main() == 1
    assert written == [False, True] and out.read_text(encoding="utf-8").count("| 1 passed |") == 2
    monkeypatch.setattr(sys, "argv", ["nightly", "--out", str(out), "--only", "one"])
    assert nightly.main() == 0
