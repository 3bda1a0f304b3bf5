"""Code: functions that a model writes, judged by tests that run in the sandbox; pass@k (Chen et al. 2021).

The code of an answer is made whole with its problem, and the tests follow it. The problems are those of HumanEval (Chen et al.
2021) and MBPP (Austin et al. 2021), by the names of their fields.
"""

from __future__ import annotations

import builtins
import keyword
import re
import secrets
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from bessemer.core.config import setting
from bessemer.core.records import Record
from bessemer.core.sandbox import Limits, Program, Result, Sandbox
from bessemer.tasks.config import SampledConfig, TaskConfig
from bessemer.tasks.file_task import Example, FileTask
from bessemer.tasks.generate import pass_at_powers
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome

#: What ends a function: of Chen et al. (2021), section 2.1, and what follows one in tests or in text.
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\n@", '\n"""', "\n```")


class CodeConfig(SampledConfig, TaskConfig):
    """Functions that are completed and tested. The rows have the fields of HumanEval or those of MBPP."""

    kind: Literal["code"] = setting("code", "write a function, whose tests are run")
    joiner: str = setting("", "text between a question and its answer")
    instruction: str = setting(
        "Write the Python function in one block of code.",
        "line before each problem, with `chat`; plain text is the beginning of the code alone",
    )
    sandbox: Literal["namespaces", "landlock", "seccomp", "rlimits"] = setting(
        "landlock", "weakest tier of the sandbox in which code is run; below it the task is refused", affects_output=False
    )
    seconds: float = setting(10.0, "time for one program, its tests included", unit="seconds", gt=0)
    memory: int = setting(1 << 30, "most memory of one program", unit="bytes", ge=1 << 26)
    max_tokens: int = setting(512, "longest answer", unit="tokens", ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        default_factory=lambda: list(_STOPS), description="texts before which an answer ends; with `chat` a turn's end does"
    )


class CodeTask(FileTask[CodeConfig], GenerationTask):
    """Programming problems over a file."""

    def __init__(self, config: CodeConfig, folders: list[Path]) -> None:
        """Raises SandboxError where no tier is strong enough."""
        self._sandbox = Sandbox(
            Limits(seconds=config.seconds, cpu_seconds=config.seconds, memory=config.memory), minimum=config.sandbox
        )
        super().__init__(config, folders)
        self.generation = config.generation
        self._problems = [read_problem(record) for record in self._items]

    def questions(self) -> list[GenerationQuestion]:
        return self._generation_questions(
            lambda item, row: self._prompter.context(item, row, self._request(self._problems[item].prompt), self._example)
        )

    def headline(self, form: str) -> str:
        return "pass@1"

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        return self.judge_all([(question, texts)])[0]

    def judge_all(self, answered: Sequence[tuple[GenerationQuestion, Sequence[str]]]) -> list[Outcome]:
        """pass@1, the share of samples that pass; of several also `pass@k`. All programs run side by side, on all cores.

        A program that is stopped or refused is wrong, and counted.
        """
        texts = [(self._problems[question.item], text) for question, of_item in answered for text in of_item]
        runs = [tested_program(problem, text) for problem, text in texts]
        results = self._sandbox.run_many([run.program for run in runs])
        verdicts: list[Verdict] = [
            verdict(run, result) if text.strip() else "empty"
            for (_, text), run, result in zip(texts, runs, results, strict=True)
        ]
        outcomes, start = [], 0
        for question, of_item in answered:
            outcomes.append(self._outcome(question, of_item, verdicts[start : start + len(of_item)]))
            start += len(of_item)
        return outcomes

    def _outcome(self, question: GenerationQuestion, texts: Sequence[str], verdicts: Sequence[Verdict]) -> Outcome:
        counted = Counter(verdicts)
        scores = {"pass@1": counted["passed"] / len(texts), **pass_at_powers(len(texts), counted["passed"])}
        counts = {"programs timed out": counted["timed_out"], "programs refused": counted["refused"]}
        gold = self._problems[question.item].solution or None
        return Outcome(scores, "\n\n".join(texts), list(verdicts), gold, counts=counts)

    def _request(self, prompt: str) -> str:
        return f"{self._config.instruction}\n\n{prompt}" if self._config.chat else prompt

    def _example(self, record: Record) -> Example:
        problem = read_problem(record)
        if not problem.solution:
            raise record.error("has no solution ('canonical_solution', or 'code'), which an example needs")
        block = f"```python\n{whole_code(problem, problem.solution)}\n```"
        return Example(self._request(problem.prompt), block if self._config.chat else problem.solution)


#: How a program ended. `refused`: the sandbox stopped it, or refused it something; `empty`: no code at all.
Verdict = Literal["passed", "failed", "timed_out", "refused", "empty"]

_FENCE = re.compile(r"^([^\S\n]*)```[^\n]*\n(.*?)(?:^[^\S\n]*```|\Z)", re.DOTALL | re.MULTILINE)
#: A line that begins code which stands in a text without a fence.
_CODE_LINE = re.compile(
    r"^(?:import\s+\w|from\s+[\w.]+\s+import\b|@\w|class\s+\w+\s*[(:]|(?:async\s+)?def\s+\w|try:"
    r"|(?:if|for|with)\b[^\n]*:[^\S\n]*$|[A-Za-z_]\w*(?:,[ ]*[A-Za-z_]\w*)*[^\S\n]*=(?!=))",
    re.MULTILINE,
)
#: A name that is called, not as a method.
_CALLED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s*\(")
_DEFINED = re.compile(r"^(?:async\s+)?def\s+(\w+)", re.MULTILINE)
_NO_FUNCTIONS = {*dir(builtins), *keyword.kwlist}
#: The file of the solution and its tests, beside the program that runs it.
_FILE = "solution.py"
#: Prints a word that the solution does not know when the tests have ended: `sys.exit(0)` before them does not pass.
_RUNNER = f"""\
import os, sys
word = sys.stdin.readline()
with open({_FILE!r}) as file:
    code = compile(file.read(), {_FILE!r}, "exec")
exec(code, {{"__name__": "solution"}})
sys.stdout.flush()
os.write(1, b"\\n" + word.encode())
"""
#: Python's errors for what the sandbox refuses.
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
    """The function that an assertion tests: the first call that the code defines, else the first that is no builtin."""
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
    match = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE)
    return None if match is None else match.start()


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
