"""Programs that are tested in the sandbox. A container may offer the weakest tier alone, so no more is asked for."""

from pathlib import Path

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.records import Record, json_lines
from bessemer.core.sandbox import SandboxError
from bessemer.tasks import registry
from bessemer.tasks.code import answered_code, read_problem, whole_code
from bessemer.tasks.config import TaskOptions
from tests.tasks.written import task_of

HUMANEVAL = {
    "task_id": "T/0",
    "prompt": 'import math\n\n\ndef area(radius: float) -> float:\n    """Of a circle."""\n',
    "entry_point": "area",
    "canonical_solution": "    return math.pi * radius**2\n",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.01\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to double a number.",
    "code": "def double(n):\n    return 2 * n",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
    "test_setup_code": "import math",
}
SANITISED = {
    "task_id": 3,
    "prompt": MBPP["text"],
    "code": MBPP["code"],
    "test_list": ["assert math.isclose(double(2), 4)"],
    "test_imports": ["import math"],
}


def judged(folder, row, *texts, **settings):
    options = TaskOptions(samples=len(texts)) if len(texts) > 1 else None
    task = task_of(folder, [row], options, kind="code", sandbox="rlimits", **{"seconds": 20, **settings})
    return task.judge(task.questions()[0], texts)


def test_a_function_is_completed_and_its_tests_decide(tmp_path):
    right, body = HUMANEVAL["canonical_solution"], "    return radius\n"
    again = "def area(r):\n    return math.pi * r * r"
    outcome = judged(tmp_path, HUMANEVAL, right, body, f"Here:\n```python\n{again}\n```\nDone.", "    return (")
    assert outcome.chosen == ["passed", "failed", "passed", "failed"]
    # 1 − C(2, 2) / C(4, 2)
    assert outcome.scores == {"pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1}
    assert outcome.counts == {"programs timed out": 0, "programs refused": 0}


def test_what_is_stopped_or_refused_is_wrong_and_counted(tmp_path):
    row = {**HUMANEVAL, "test": "def check(candidate):\n    candidate(2)\n"}
    endless, flood = "    while True: pass\n", "    while True: print('x' * 10_000)\n"
    outcome = judged(tmp_path, row, endless, flood, "", seconds=2)
    assert outcome.chosen == ["timed_out", "refused", "empty"] and outcome.scores["pass@1"] == 0
    assert outcome.counts == {"programs timed out": 1, "programs refused": 1}


@pytest.mark.parametrize("cheat", ["    raise SystemExit(0)\n", "    import os; os._exit(0)\n", "    exit()\n"])
def test_an_end_before_the_tests_is_no_pass(tmp_path, cheat):
    assert judged(tmp_path, HUMANEVAL, cheat).chosen == ["failed"]


def test_both_versions_of_mbpp_are_read_as_they_are(tmp_path):
    for row in (MBPP, SANITISED):
        task = task_of(tmp_path, [row], kind="code", sandbox="rlimits")
        (question,) = task.questions()
        assert question.context.startswith('"""\nWrite a function to double a number.\n\nassert ')
        outcomes = task.judge_all([(question, [MBPP["code"]]), (question, ["def double(n): return n"])])
        assert [outcome.scores["pass@1"] for outcome in outcomes] == [1, 0]


def test_the_code_of_an_answer_is_the_block_that_defines_the_function():
    text = "Try:\n```\nprint(1)\n```\nor\n```python\ndef f(x):\n    return x\n```\nand\n```python\nf(1)\n```"
    assert answered_code(text, "f") == "def f(x):\n    return x\n"
    assert answered_code(text, "g") == "print(1)\n"
    assert answered_code("```python\ndef f(x):\n    return x", "f") == "def f(x):\n    return x"
    assert answered_code("    return x\n", "f") == "    return x\n"


DOUBLE = "def double(n):\n    return 2 * n\n"
ANSWERS = {
    "in a list": "1. First:\n   ```python\n   def double(n):\n       return 2 * n\n   ```\n2. Done.",
    "indented further than its fence": "- So:\n  ```python\n    def double(n):\n        return 2 * n\n  ```",
    "a body in a list": "1. First:\n   ```python\n       return 2 * n\n   ```",
    "a body": "```python\n    return 2 * n\n```",
    "behind a sentence": f"Here is it:\n\n{DOUBLE}",
    "with what it needs": f"Sure, import helps.\nimport math\nTWO = 2\n\n{DOUBLE.replace('2 *', 'math.gcd(TWO, TWO) *')}",
    "with a constant": f"Certainly\n\nTWO = 2\n\n@staticmethod\n{DOUBLE.replace('2 *', 'TWO *')}",
    "behind statements": f"ONE, TWO = 1, 2\nif TWO > ONE:\n    THREE = 3\n\n{DOUBLE.replace('2 *', '(THREE - ONE) *')}",
    "behind a block": f"if True:\n    TWO = 2\n{DOUBLE.replace('2 *', 'TWO *')}",
    "asynchronous helper": f"Two of them:\nasync def wait():\n    pass\n\n{DOUBLE}",
}


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
def test_right_code_is_right_wherever_it_stands_in_an_answer(text):
    row = {**HUMANEVAL, "prompt": 'def double(n):\n    """Twice."""\n', "entry_point": "double"}
    namespace = {}
    exec(whole_code(read_problem(Record(row, 0, "row")), text), namespace)
    assert namespace["double"](4) == 8


def test_a_blocks_lines_stay_as_they_are_where_it_needs_no_dedent():
    block = 'def f(x):\n    """One.\n   \n    Two."""\n'
    assert answered_code(f"```\n{block}```", "f") == block


@pytest.mark.parametrize(
    ("assertion", "code", "expected"),
    [
        ("assert set(similar((3, 4), (4, 5))) == set((4,))", "", "similar"),
        ("assert set(similar((3, 4), (4, 5))) == set((4,))", "def similar(a, b):\n    return set(a) & set(b)", "similar"),
        ("assert math.isclose(double(2), 4)", "", "double"),
        ("assert isclose(double(2), 4)", "def helper(n): return n\ndef double(n): return 2 * n", "double"),
        ("assert not (is_odd(2))", "", "is_odd"),
        # a name of Python's that the data defines anew, or that is all there is
        ("assert sum(10, 15) == 6", "def sum(a, b):\n    return 6", "sum"),
        ("assert len(sum(10, 15)) == 6", "def sum(a, b):\n    return 6", "sum"),
        ("assert sum(10, 15) == 6", "", "sum"),
        ("assert longest([Pair(5, 24)], 1) == 3", "class Pair(object):\n    pass\ndef longest(a, n):\n    return 3", "longest"),
    ],
)
def test_the_function_of_a_row_of_mbpp_is_the_one_that_its_tests_are_about(assertion, code, expected):
    problem = read_problem(Record({**MBPP, "test_list": [assertion], "code": code}, 0, "row"))
    assert problem.entry_point == expected


def test_helpers_of_the_prompt_stay_where_an_answer_defines_the_function_anew():
    prompt = "def twice(x):\n    return 2 * x\n\n\ndef f(x):\n    '''Use def f.'''\n"
    problem = read_problem(Record({**HUMANEVAL, "prompt": prompt, "entry_point": "f"}, 0, "row"))
    namespace = {}
    exec(whole_code(problem, "```python\ndef f(x):\n    return twice(twice(x))\n```"), namespace)
    assert namespace["f"](3) == 12


def test_every_shipped_problem_is_solved_by_its_own_solution(tmp_path):
    path = Path(registry.__file__).parent / "files" / "code.jsonl"
    rows = json_lines(path.read_text(encoding="utf-8"))
    task = task_of(tmp_path, rows, kind="code", sandbox="rlimits", seconds=60, id="task_id")
    questions = task.questions()
    outcomes = task.judge_all([(question, [row["canonical_solution"]]) for question, row in zip(questions, rows, strict=True)])
    assert len(rows) == 12 and [outcome.chosen for outcome in outcomes] == [["passed"]] * 12


def test_a_chat_is_asked_for_a_block_and_shown_solutions(tmp_path):
    rows = [HUMANEVAL, {**HUMANEVAL, "task_id": "T/1"}]
    task = task_of(tmp_path, rows, TaskOptions(chat=True, shots=1), kind="code", sandbox="rlimits")
    example, answer, asked = task.questions()[0].context
    assert answer["content"].startswith("```python\nimport math") and task.generation.stop == ()
    assert asked["content"].startswith("Write the Python function in one block of code.\n\nimport math")
    assert example["content"] == asked["content"]


def test_a_row_of_neither_format_and_a_sandbox_that_is_too_weak_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ArtefactError, match=r"task.jsonl:1: has neither 'test' and 'entry_point', as HumanEval has"):
        task_of(tmp_path, [{"prompt": "?"}], kind="code", sandbox="rlimits")
    with pytest.raises(ArtefactError, match=r"task.jsonl:1: 'test_list' must begin with an assertion"):
        task_of(tmp_path, [{**MBPP, "test_list": []}], kind="code", sandbox="rlimits")

    def refuse(*_, minimum, **__):
        raise SandboxError(f"no sandbox of tier {minimum} or stronger works here")

    monkeypatch.setattr("bessemer.tasks.code.Sandbox", refuse)
    with pytest.raises(SandboxError, match="no sandbox of tier namespaces or stronger"):
        task_of(tmp_path, [HUMANEVAL], kind="code", sandbox="namespaces")
