"""What programs can do in the sandbox, what their limits give, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.sandbox import Limits, Program, Sandbox, SandboxError, Tier, sandbox, strongest_tier
from bessemer.core.sandbox.resources import folder_bytes
from bessemer.core.sandbox.tiers import GAPS, gaps

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return Sandbox(Limits(memory=512 << 20), minimum=Tier.RLIMITS)
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_program_reads_its_stdin_and_files_and_prints(box):
    code = "import sys, helper\nprint(sys.stdin.read() * 2, helper.data())\nprint('late', file=sys.stderr)\nsys.exit(3)"
    files = {"helper.py": "def data(): return open('deep/data').read()", "deep/data": b"7"}
    result = box.run(code, stdin="ab", files=files)
    assert (result.stdout, result.stderr, result.exit_code, result.limit, result.ok) == ("abab 7\n", "late\n", 3, None, False)
    assert box.run("print(1)").ok


def test_ordinary_programs_run(box):
    code = """
import asyncio, os, shutil, sqlite3, ssl, subprocess, sys, tempfile, threading, zoneinfo
async def later():
    await asyncio.sleep(0)
    return "asyncio"
print(asyncio.run(later()))
print(subprocess.run([sys.executable, "-c", "print('subprocess')"], capture_output=True, text=True, check=True).stdout, end="")
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
with tempfile.NamedTemporaryFile() as file: shutil.copy2(file.name, "copy")
print(sqlite3.connect("database").execute("select 'sqlite'").fetchone()[0])
open(os.devnull, "w").write("x")
exit(0)
"""
    result = box.run(code)
    assert (result.stdout.split(), result.stderr, result.exit_code) == (["asyncio", "subprocess", "thread", "sqlite"], "", 0)


def test_peak_memory_and_processor_time_are_those_of_the_program(box):
    result = box.run("import time\nheld = bytearray(b'x') * (100 << 20)\nwhile time.process_time() < 0.3: pass")
    assert 100 << 20 < result.peak_memory < 150 << 20
    assert 0.3 <= result.cpu_seconds <= result.seconds


def test_a_limit_on_memory_is_an_error_of_the_program(box):
    result = box.run("bytearray(600 << 20)")
    assert (result.exit_code, result.limit) == (1, None)
    assert result.stderr.endswith("MemoryError\n")


def test_input_that_is_not_read_and_output_that_fills_the_pipes_do_not_block(box):
    result = box.run("print('x' * 300_000)", stdin=b"y" * (1 << 20), files={"large": b"z" * (1 << 20)})
    assert len(result.stdout) == 300_001


def test_text_is_cut_at_the_limit_of_output(box):
    result = box.run("while True: print('x' * 99)", limits=Limits(output=1000))
    assert (len(result.stdout), result.limit, result.exit_code, result.timed_out) == (1000, "output", None, False)


def test_many_programs_give_their_results_in_order_and_run_side_by_side_up_to_a_number(box):
    code = "import sys, time\nstart = time.monotonic()\ntime.sleep(0.2)\nprint(sys.stdin.read(), start, time.monotonic())"
    results = box.run_many([Program(code, stdin=str(number)) for number in range(6)], workers=2)
    rows = [result.stdout.split() for result in results]
    assert [row[0] for row in rows] == [str(number) for number in range(6)]
    spans = [(float(start), float(end)) for _, start, end in rows]
    together = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(together) == 2


def test_packages_of_the_environment_are_there_only_where_asked_for(box):
    code = "import numpy; print(numpy.arange(3).sum())"
    assert "ModuleNotFoundError" in box.run(code).stderr
    try:
        other = Sandbox(Limits(memory=2 << 30), packages=True, minimum=Tier.RLIMITS)
    except SandboxError as error:
        pytest.skip(str(error))
    assert other.run(code).stdout == "3\n"


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/../../b", "", ".", "main.py"])
def test_a_file_that_does_not_lie_in_the_working_folder_is_refused(box, name):
    with pytest.raises(ConfigError, match="sandbox: "):
        box.run("pass", files={name: ""})


def test_a_program_that_is_not_there_is_named(box):
    with pytest.raises(SandboxError, match="no-such-program cannot be run in it: there is no such program"):
        box.run(["no-such-program"])


def _is_running(token: str) -> bool:
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if token.encode() in place.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def _wait_until(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
SLEEP = ["python", "-c", "import time; time.sleep(60)"]


@needs_proc
def test_an_interrupt_ends_the_program(box):
    token = f"interrupted-{os.getpid()}"

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            box.run([*SLEEP, token])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not _is_running(token)


@needs_proc
@pytest.mark.parametrize("maximum", [Tier.NAMESPACES, Tier.LANDLOCK])
def test_a_killed_caller_takes_the_program_with_it(maximum, tmp_path):
    token = f"orphan-{os.getpid()}-{maximum}"
    code = f"from bessemer.core.sandbox import Sandbox\nSandbox(maximum={maximum.value!r}).run({[*SLEEP, token]!r})"
    source = str(Path(sandbox.__file__).parents[3])
    environment = {"PYTHONPATH": source, "TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    if not _wait_until(lambda: _is_running(token) or caller.poll() is not None) or caller.poll() is not None:
        pytest.skip(caller.communicate()[1].decode().strip().rpartition("\n")[2])
    caller.kill()
    caller.communicate()
    assert _wait_until(lambda: not _is_running(token))


WITHOUT_NAMESPACES = """
from bessemer.core.sandbox import Sandbox
from bessemer.core.sandbox.launcher import linux
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
linux.install_filter(refuse_signals=False, ignore_metadata=False)
box = Sandbox()
print(box.tier.value, box.run("print(1)").stdout, end="")
"""


def test_where_namespaces_are_refused_as_in_a_container_the_tier_is_landlock():
    try:
        Sandbox(maximum=Tier.LANDLOCK)
    except SandboxError as error:
        pytest.skip(str(error))
    source = str(Path(sandbox.__file__).parents[3])
    command = [sys.executable, "-c", WITHOUT_NAMESPACES]
    done = subprocess.run(command, env={"PYTHONPATH": source}, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "landlock 1\n"


def test_below_the_minimum_nothing_is_run_and_the_line_says_why(monkeypatch):
    monkeypatch.setattr(sandbox, "_why_not", lambda tier, python: None if tier is Tier.RLIMITS else "not today")
    with pytest.raises(SandboxError) as refusal:
        Sandbox(minimum="landlock")
    assert str(refusal.value) == (
        "no sandbox of tier landlock or stronger works here (namespaces: not today; landlock: not today); code is not run"
    )
    assert Sandbox(minimum="rlimits").tier is Tier.RLIMITS


def test_tiers_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="no sandbox tier 'steel'; the tiers are namespaces, landlock, seccomp, rlimits"):
        Sandbox(minimum="steel")
    with pytest.raises(ConfigError, match="maximum tier rlimits is below its minimum landlock"):
        Sandbox(maximum="rlimits")
    with pytest.raises(ConfigError, match="processes is 0"):
        Limits(processes=0)


def test_a_stronger_tier_has_no_gap_that_a_weaker_one_has_not():
    for own_user in (False, True):
        for macos in (False, True):
            known = [{gap.hazard for gap in gaps(tier, own_user=own_user, macos=macos)} for tier in Tier]
            assert all(stronger <= weaker for stronger, weaker in pairwise(known))


def test_the_page_names_every_gap():
    page = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
    assert [gap.hazard for gap in GAPS if gap.text not in page] == []


def test_doctor_names_the_tier(monkeypatch):
    from bessemer.cli.doctor import _sandbox

    tier, _ = strongest_tier()
    mark, name, finding = next(iter(_sandbox()))
    assert name == "sandbox"
    assert finding.startswith(tier or "none")
    assert (mark == "ok") == (tier in (Tier.NAMESPACES, Tier.LANDLOCK))


def test_a_folders_bytes_are_counted_until_they_are_more_than_asked_for(tmp_path):
    (tmp_path / "below").mkdir()
    for path in (tmp_path / "first", tmp_path / "below" / "second"):
        path.write_bytes(bytes(10_000))
    first, second = (path.stat().st_blocks * 512 for path in (tmp_path / "first", tmp_path / "below" / "second"))
    assert folder_bytes(tmp_path, most=first) == first + second
    assert folder_bytes(tmp_path, most=first - 1) == first
    assert folder_bytes(tmp_path / "gone", most=first) == 0
    links = [tmp_path / "the folder again", tmp_path / "the file again"]
    for link, target in zip(links, (tmp_path, tmp_path / "first"), strict=True):
        link.symlink_to(target)
    of_links = sum(link.lstat().st_blocks * 512 for link in links)
    assert folder_bytes(tmp_path, most=100 * second) == first + second + of_links
