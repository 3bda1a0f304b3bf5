"""Loops are compiled again when something changes that they have from another file, and by one process of several."""

import json
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


#: Runs programs given as lines of JSON, each in a copy of this process, where what takes longest to import is there already;
#: prints how they ended.
HOST = """
import json, os, sys, traceback
import filelock, numba

def run(program, arguments, folder, streams):
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(folder)
    sys.argv, sys.path[0] = ["-c", *arguments], folder
    exec(program, {"__name__": "__main__"})

for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                run(*job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)
"""


@pytest.fixture(scope="module")
def host():
    command = [sys.executable, "-B", "-c", HOST]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env={}) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(host, tmp_path):
    """Runs a program beside the copied package in as many new processes as there are lists of arguments, at once; what each
    printed, and what it wrote to a file for errors (`terminal`: or to that)."""

    def run(program, *arguments, terminal=None):
        streams = [(tmp_path / f"out-{number}", terminal or tmp_path / f"err-{number}") for number in range(len(arguments))]
        for out, error in streams:
            out.write_text("", encoding="utf-8")
            terminal or error.write_text("", encoding="utf-8")
        jobs = [(program, each, str(tmp_path), list(map(str, stream))) for each, stream in zip(arguments, streams, strict=True)]
        host.stdin.write(json.dumps(jobs) + "\n")
        host.stdin.flush()
        assert not any(json.loads(host.stdout.readline())), [
            terminal or error.read_text(encoding="utf-8") for _, error in streams
        ]
        return [
            (out.read_text(encoding="utf-8"), "" if terminal else error.read_text(encoding="utf-8")) for out, error in streams
        ]

    return run


@pytest.fixture
def text(tmp_path):
    """A folder of loops beside a copy of what compiles them; its loop `double` has a number from `table.py`."""
    text = tmp_path / "bessemer" / "data" / "text"
    text.mkdir(parents=True)
    package = Path(bessemer.__file__).parent
    for name in ("__init__.py", "data/__init__.py", "data/text/__init__.py", "data/text/compiled.py"):
        shutil.copy(package / name, tmp_path / "bessemer" / name)
    shutil.copytree(package / "core", tmp_path / "bessemer" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (text / "table.py").write_text("NUMBER = 3\n", encoding="utf-8")
    (text / "middle.py").write_text("from bessemer.data.text.table import NUMBER\n", encoding="utf-8")
    loop = "from bessemer.data.text.compiled import compiled\nfrom bessemer.data.text.middle import NUMBER\n"
    (text / "loop.py").write_text(loop + "@compiled\ndef double(factor):\n    return 2 * factor * NUMBER\n", encoding="utf-8")
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


def test_processes_that_begin_together_compile_a_loop_once(text, tmp_path, run):
    begun = [str(tmp_path / name) for name in ("first", "second", "third")]
    said = run(TOGETHER, *([own, *begun] for own in begun))
    assert sorted(int(out) for out, _ in said) == [0, 0, 1]


def test_a_loop_is_compiled_where_another_process_holds_the_lock_and_does_not_end(text, run):
    def printed(program):
        ((out, _),) = run(f"from bessemer.data.text import compiled, loop; {program}", [])
        return out.strip()

    kept = Path(printed("print(loop.double._cache._cache_file._index_path)"))
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f"{kept}.lock"):
        assert printed("compiled._LONGEST_COMPILATION = 0.01; print(loop.double(2))") == "12"


def test_compiling_is_announced_once_and_at_a_terminal_alone(text, run):
    program = "from bessemer.data.text import loop; loop.double(2)"
    ((_, said),) = run(program, [])
    (kept,) = text.glob("__pycache__/*.nbi")
    terminal, its_end = pty.openpty()
    for _ in range(2):
        kept.unlink()
        run(program, [], terminal=os.ttyname(its_end))
    os.write(its_end, b"END\n")
    shown = b""
    while b"END" not in shown:
        shown += os.read(terminal, 1000)
    assert said == "" and shown.count(b"compiling the loops over text for this machine") == 1


def test_a_change_in_an_imported_file_compiles_a_loop_again(text, run):
    ((out, _),) = run(PROGRAM, [str(text)])
    assert out.strip() == "[(6, 0), (6, 1), (8, 0), (6, 0)]"
