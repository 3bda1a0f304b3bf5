"""Code: functions that a model writes, judged by tests that run in the sandbox; pass@k (Chen et al. 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bessemer.core.config import setting
from bessemer.core.records import Record
from bessemer.core.sandbox import Limits, Sandbox
from bessemer.tasks.config import SampledConfig, TaskConfig
from bessemer.tasks.file_task import FileTask
from bessemer.tasks.program import Verdict, read_problem, tested_program, verdict, whole_code
from bessemer.tasks.prompting import Example
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.samples import pass_at_powers

#: Where the function is over, in Chen et al. (2021), section 2.1, and what follows one in a file of tests or of text.
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
        return [
            GenerationQuestion(
                item,
                self._prompter.context(item, record, self._asked(self._problems[item].prompt), self._example),
                id=self._ids[item],
                cluster=self._clusters[item],
            )
            for item, record in enumerate(self._items)
        ]

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
        found = Counter(verdicts)
        scores = {"pass@1": found["passed"] / len(texts), **pass_at_powers(len(texts), found["passed"])}
        counts = {"programs timed out": found["timed_out"], "programs refused": found["refused"]}
        gold = self._problems[question.item].solution or None
        return Outcome(scores, "\n\n".join(texts), list(verdicts), gold, counts=counts)

    def _asked(self, prompt: str) -> str:
        return f"{self._config.instruction}\n\n{prompt}" if self._config.chat else prompt

    def _example(self, record: Record) -> Example:
        problem = read_problem(record)
        if not problem.solution:
            raise record.error("has no solution ('canonical_solution', or 'code'), which an example needs")
        block = f"```python\n{whole_code(problem, problem.solution)}\n```"
        return Example(self._asked(problem.prompt), block if self._config.chat else problem.solution)
