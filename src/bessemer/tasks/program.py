"""Programs out of answers: the code of an answer, made whole with its problem, and the tests behind it.

The problems are those of HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), by the names of their fields.
"""

from __future__ import annotations

import re
import secrets
from typing import Literal, NamedTuple

from bessemer.core.records import Record
from bessemer.core.sandbox import Program, Result

#: How a program ended. `refused`: the sandbox stopped it, or held something back that it asked for; `empty`: no code at all.
Verdict = Literal["passed", "failed", "timed_out", "refused", "empty"]

_FENCE = re.compile(r"^[^\S\n]*```[^\n]*\n(.*?)(?:^[^\S\n]*```|\Z)", re.DOTALL | re.MULTILINE)
#: The file of the solution and its tests, beside the program that runs it.
_FILE = "solution.py"
#: Says that the tests came to their end, by a word that is not in the solution's file: `sys.exit(0)` before them says nothing.
_RUNNER = f"""\
import os, sys
word = sys.stdin.readline()
with open({_FILE!r}) as file:
    code = compile(file.read(), {_FILE!r}, "exec")
exec(code, {{"__name__": "solution"}})
sys.stdout.flush()
os.write(1, b"\\n" + word.encode())
"""
#: Errors by which Python says that the sandbox held something back.
_REFUSALS = ("PermissionError", "MemoryError", "BlockingIOError", "OSError: [Errno 1]", "RuntimeError: can't start new thread")


class Problem(NamedTuple):
    """A function to write. prompt: what its code begins with, or the task in words. tests: code that raises where it is wrong.

    entry_point: the function's name. solution: a right one, as it continues the prompt; empty where the data has none.
    completes: whether an answer continues the prompt's code; otherwise it is whole.
    """

    prompt: str
    entry_point: str
    tests: str
    solution: str
    completes: bool


def read_problem(record: Record) -> Problem:
    """A row of HumanEval (`prompt`, `entry_point`, `test`), or of MBPP (`text` or `prompt`, `test_list`) in either version.

    Raises ArtefactError for a row that is neither.
    """
    if record.values.get("test_list") is not None:
        return _mbpp(record)
    if record.values.get("test") is None:
        raise record.error("has neither 'test' and 'entry_point', as HumanEval has, nor 'test_list', as MBPP has")
    entry_point = record.text("entry_point")
    solution = record.values.get("canonical_solution")
    tests = f"{record.text('test')}\n\ncheck({entry_point})\n"
    return Problem(record.text("prompt"), entry_point, tests, str(solution or ""), completes=True)


def _mbpp(record: Record) -> Problem:
    tests = record.texts("test_list")
    called = re.search(r"(\w+)\s*\(", tests[0].partition("assert")[2]) if tests else None
    if called is None:
        raise record.error("'test_list' must begin with an assertion that calls the function")
    before = record.values.get("test_imports")
    setup = "\n".join(map(str, before)) if isinstance(before, list) else str(record.values.get("test_setup_code") or "")
    text = record.text("text" if record.values.get("text") is not None else "prompt")
    shown = "\n".join(tests)
    prompt = f'"""\n{text}\n\n{shown}\n"""\n'
    return Problem(prompt, called[1], f"{setup}\n{shown}\n", str(record.values.get("code") or ""), completes=False)


def answered_code(text: str, entry_point: str) -> str:
    """The code of an answer: the first fenced block that defines the function, else the first one, else all of it."""
    blocks = _FENCE.findall(text)
    defining = [block for block in blocks if _definition(block, entry_point) is not None]
    return next(iter([*defining, *blocks]), text)


def _definition(code: str, entry_point: str) -> int | None:
    """Where the function's definition begins; None where there is none."""
    found = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE)
    return None if found is None else found.start()


def whole_code(problem: Problem, text: str) -> str:
    """An answer as code that defines the function. One that defines it itself gets what stands in the prompt before it."""
    code = answered_code(text, problem.entry_point)
    if not problem.completes:
        return code
    if _definition(code, problem.entry_point) is not None:
        return problem.prompt[: _definition(problem.prompt, problem.entry_point)] + code
    return problem.prompt + code


class TestedProgram(NamedTuple):
    """A program with the word by which it says that its tests passed."""

    program: Program
    word: str


def tested_program(problem: Problem, text: str) -> TestedProgram:
    """The program that runs a problem's tests on an answer."""
    word = secrets.token_hex(16)
    files = {_FILE: f"{whole_code(problem, text)}\n\n{problem.tests}"}
    return TestedProgram(Program(_RUNNER, stdin=f"{word}\n", files=files), word)


def verdict(run: TestedProgram, result: Result) -> Verdict:
    """How the program of a run ended."""
    if result.ok and run.word in result.stdout:
        return "passed"
    if result.timed_out:
        return "timed_out"
    last = result.stderr.rstrip().rpartition("\n")[2]
    killed = result.exit_code is None or result.exit_code < 0
    return "refused" if result.limit is not None or killed or last.startswith(_REFUSALS) else "failed"
