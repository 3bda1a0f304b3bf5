"""Accuracy by thinking budget: `python budgets.py MODEL... [ITEMS]` asks the sums that are held out.

A model is a folder, as `runs/reasoning/stages/rl/model`. The budget counts the tokens of an answer up to where its thinking is
closed; 64 is more than this model ever thinks, and at 0 it answers at once. Needs what `recipe.yaml` needs.
"""

import sys
from pathlib import Path
from statistics import fmean

from bessemer.evaluation.task_answerers import answers_after_thinking
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.registry import find_tasks

BUDGETS = (0, 8, 16, 24, 32, 64)
HERE = Path(__file__).parent


def accuracy(engine: Engine, budget: int, items: int) -> tuple[float, float]:
    """Share of right answers, and the mean number of tokens that the model wrote."""
    (task,) = find_tasks([str(HERE / "sums_held_out.yaml")], TaskOptions(limit=items))
    questions = list(task.questions())
    params = SamplingParams(max_tokens=80, temperature=0)
    contexts = [question.context for question in questions]
    answers = answers_after_thinking(engine, contexts, params, budget, range(items))
    outcomes = [task.judge(question, [answer.text]) for question, answer in zip(questions, answers, strict=True)]
    return fmean(outcome.scores["accuracy"] for outcome in outcomes), fmean(answer.tokens for answer in answers)


def main(models: list[str], items: int = 500) -> None:
    """Print a table of each model."""
    for model in models:
        print(model)
        with Engine(Path(model)) as engine:
            for budget in BUDGETS:
                right, tokens = accuracy(engine, budget, items)
                print(f"  budget {budget:>2}: {right:6.1%} right, {tokens:4.1f} tokens")


if __name__ == "__main__":
    *folders, last = sys.argv[1:]
    main(folders, int(last)) if last.isdigit() else main([*folders, last])
