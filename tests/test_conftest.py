"""What the suite does around each test: a limit of time, and what a worker tells of it."""

import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tests.conftest import limited, tell_what_counts

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the system has no alarm")


def test_what_waits_for_ever_is_stopped_and_what_ends_is_left_alone():
    with pytest.raises(pytest.fail.Exception, match=r"the wait took longer than 0\.05 s"), limited(0.05, "the wait"):
        threading.Event().wait(60)
    with limited(60, "the wait"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_test_that_hangs_fails_and_those_behind_it_are_run(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import tests.conftest as ours\n"
        "from tests.conftest import pytest_runtest_call, pytest_runtest_setup, pytest_runtest_teardown\n"
        "ours.TEST_SECONDS['usual'] = 0.2\n",
        encoding="utf-8",
    )
    (tmp_path / "test_it.py").write_text(
        "import threading\ndef test_hangs():\n    threading.Event().wait(60)\ndef test_behind():\n    pass\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, encoding="utf-8", check=False)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "test_hangs took longer than 0.2 s" in done.stdout


def test_a_test_that_hangs_in_compiled_code_ends_its_process_with_the_stacks(tmp_path):
    program = (
        "import signal, tests.conftest as ours\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"  # as where no line of Python runs
        "with ours.limited(0.1, 'it'):\n    signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert done.returncode == 1 and "Timeout (0:00:00.15" in done.stderr, done.stderr


def test_a_worker_tells_of_every_call_and_of_what_failed_or_took_time_around_it():
    told = []
    worker = SimpleNamespace(sendevent=lambda name, **said: told.append((name, *said.values())))
    tell_what_counts([object(), worker])
    quick, slow = {"outcome": "passed", "duration": 0.001}, {"outcome": "passed", "duration": 1.0}
    counts = [{"when": "call"} | quick, {"when": "setup"} | slow, {"when": "teardown", "outcome": "failed", "duration": 0.001}]
    for report in ({"when": "setup"} | quick, *counts, {"when": "teardown"} | quick):
        worker.sendevent("testreport", data=report)
    worker.sendevent("logstart", nodeid="a")
    assert told == [*(("testreport", report) for report in counts), ("logstart", "a")]
