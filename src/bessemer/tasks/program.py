"""Programs out of answers: the code of an answer, made whole with its problem, and the tests behind it.

The problems are those of HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), by the names of their fields.
"""

from __future__ import annotations

import builtins
import keyword
import re
import secrets
import textwrap
from typing import Literal, NamedTuple

from bessemer.core.records import Record
from bessemer.core.sandbox import Program, Result

#: How a program ended. `refused`: the sandbox stopped it, or held something back that it asked for; `empty`: no code at all.
Verdict = Literal["passed", "failed", "timed_out", "refused", "empty"]

_FENCE = re.compile(r"^([^\S\n]*)```[^\n]*\n(.*?)(?:^[^\S\n]*```|\Z)", re.DOTALL | re.MULTILINE)
#: A line that begins code which stands in a text without a fence.
_CODE_LINE = re.compile(
    r"^(?:import\s+\w|from\s+[\w.]+\s+import\b|@\w|class\s+\w+\s*[(:]|(?:async\s+)?def\s+\w|try:"
    r"|(?:if|for|with)\b[^\n]*:[^\S\n]*$|[A-Za-z_]\w*(?:,[ ]*[A-Za-z_]\w*)*[^\S\n]*=(?!=))",
    re.MULTILINE,
)
#: A name that is called, as no method is.
_CALLED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s*\(")
_DEFINED = re.compile(r"^(?:async\s+)?def\s+(\w+)", re.MULTILINE)
_NO_FUNCTIONS = {*dir(builtins), *keyword.kwlist}
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
    code = str(record.values.get("code") or "")
    entry_point = _tested_name(tests[0].partition("assert")[2] if tests else "", code)
    if entry_point is None:
        raise record.error("'test_list' must begin with an assertion that calls the function")
    before = record.values.get("test_imports")
    setup = "\n".join(map(str, before)) if isinstance(before, list) else str(record.values.get("test_setup_code") or "")
    text = record.text("text" if record.values.get("text") is not None else "prompt")
    shown = "\n".join(tests)
    prompt = f'"""\n{text}\n\n{shown}\n"""\n'
    return Problem(prompt, entry_point, f"{setup}\n{shown}\n", code, completes=False)


def _tested_name(assertion: str, code: str) -> str | None:
    """The function that an assertion is about: of those it calls the first that the code defines, else that is no builtin."""
    called = _CALLED.findall(assertion)
    defined = set(_DEFINED.findall(code))
    ranked = [name for name in called if name in defined] + [name for name in called if name not in _NO_FUNCTIONS] + called
    return next((name for name in ranked if not keyword.iskeyword(name)), None)


def answered_code(text: str, entry_point: str) -> str:
    """The code of an answer: the first fenced block that defines the function, else the first one.

    Without blocks it is all from where code begins, if the function is defined, and all of the text if it is not.
    """
    blocks = [_without_margin(block, fence, entry_point) for fence, block in _FENCE.findall(text)]
    if blocks:
        return next((block for block in blocks if _definition(block, entry_point) is not None), blocks[0])
    if _definition(text, entry_point) is None:
        return text
    begin = _CODE_LINE.search(text)
    assert begin is not None
    return text[begin.start() :]


def _without_margin(block: str, fence: str, entry_point: str) -> str:
    """A block without the margin of the list that it stands in. fence: what stands before its fence."""
    if _definition(block, entry_point) is not None:
        return block
    dedented = textwrap.dedent(block)
    if _definition(dedented, entry_point) is not None:
        return dedented
    # a function's body keeps its own indentation
    in_margin = all(line.startswith(fence) for line in block.splitlines() if line.strip())
    return re.sub(rf"^{fence}", "", block, flags=re.MULTILINE) if in_margin else block


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
