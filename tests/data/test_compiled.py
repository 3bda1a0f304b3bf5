"""Loops are compiled again when something changes that they have from another file, and by one process of several."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import bessemer
from bessemer.data.text.compiled import compiled

PROGRAM = """
import sys
from pathlib import Path
from bessemer.data.text import compiled

def answer(number):
    for name in ("loop", "middle", "table"):
        sys.modules.pop(f"bessemer.data.text.{name}", None)
    compiled.imports_hash.cache_clear()
    Path(sys.argv[1], "table.py").write_text(f"NUMBER = {number}\\n")
    from bessemer.data.text.loop import double
    found = double(1)
    return found, sum(double.stats.cache_hits.values())

print([answer(number) for number in (3, 3, 4, 3)])
"""

TOGETHER = """
import sys, time
from pathlib import Path
from bessemer.data.text.loop import double

Path(sys.argv[1]).touch()
while not all(map(Path.exists, map(Path, sys.argv[1:]))):
    time.sleep(0.01)
assert double(2) == 12
print(sum(double.stats.cache_misses.values()))
"""


@pytest.fixture
def text(tmp_path):
    """A folder of loops beside a copy of what compiles them; its loop `double` has a number from `table.py`."""
    text = tmp_path / "bessemer" / "data" / "text"
    text.mkdir(parents=True)
    package = Path(bessemer.__file__).parent
    for name in ("__init__.py", "data/__init__.py", "data/text/__init__.py", "data/text/compiled.py"):
        shutil.copy(package / name, tmp_path / "bessemer" / name)
    shutil.copytree(package / "core", tmp_path / "bessemer" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (text / "table.py").write_text("NUMBER = 3\n")
    (text / "middle.py").write_text("from bessemer.data.text.table import NUMBER\n")
    loop = "from bessemer.data.text.compiled import compiled\nfrom bessemer.data.text.middle import NUMBER\n"
    (text / "loop.py").write_text(loop + "@compiled\ndef double(factor):\n    return 2 * factor * NUMBER\n")
    return text


@compiled
def after(count):
    return count + 1


@compiled
def counted(times):
    count = 0
    for _ in range(times):
        count = after(count)
    return count


def test_a_loop_is_compiled_once_for_integers_whether_written_or_computed():
    assert counted(3) == 3
    # none, where the caller's compiled code is kept
    assert len(after.signatures) <= 1


def test_processes_that_begin_together_compile_a_loop_once(text, tmp_path):
    begun = [str(tmp_path / name) for name in ("first", "second", "third")]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "text": True, "env": {"PYTHONPATH": str(tmp_path)}}
    processes = [
        subprocess.Popen([sys.executable, "-B", "-c", TOGETHER, own, *begun], **options)  # type: ignore[call-overload]
        for own in begun
    ]
    assert sorted(int(process.communicate()[0]) for process in processes) == [0, 0, 1]


def test_a_loop_is_compiled_where_another_process_holds_the_lock_and_does_not_end(text, tmp_path):
    def printed(program):
        command = [sys.executable, "-B", "-c", f"from bessemer.data.text import compiled, loop; {program}"]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)}
        )
        return done.stdout.strip()

    kept = Path(printed("print(loop.double._cache._cache_file._index_path)"))
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f"{kept}.lock"):
        assert printed("compiled._LONGEST_COMPILATION = 0.01; print(loop.double(2))") == "12"


def test_compiling_is_announced_once_and_at_a_terminal_alone(text, tmp_path):
    command = [sys.executable, "-B", "-c", "from bessemer.data.text import loop; loop.double(2)"]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path)}, "check": True}
    said = subprocess.run(command, **options, stderr=subprocess.PIPE, text=True).stderr  # type: ignore[call-overload]
    (kept,) = text.glob("__pycache__/*.nbi")
    terminal, its_end = pty.openpty()
    for _ in range(2):
        kept.unlink()
        subprocess.run(command, **options, stderr=its_end)  # type: ignore[call-overload]
    os.write(its_end, b"END\n")
    shown = b""
    while b"END" not in shown:
        shown += os.read(terminal, 1000)
    assert said == "" and shown.count(b"compiling the loops over text for this machine") == 1


def test_a_change_in_an_imported_file_compiles_a_loop_again(text, tmp_path):
    command = [sys.executable, "-B", "-c", PROGRAM, str(text)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)})
    assert said.stdout.strip() == "[(6, 0), (6, 1), (8, 0), (6, 0)]"
