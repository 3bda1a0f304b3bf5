"""Worked sums: three numbers are added in thinking, column by column, and the answer follows."""

import random
from collections.abc import Iterator
from typing import Any

from bessemer.tasks.generated_items import Difficulty, arithmetic_items

#: As in `sums.yaml`, whose first items these are.
SUMS = Difficulty(digits=2, terms=3, operators="+")
SEED = 1234
#: Worked sums to learn from: too few to be good.
COUNT = 500


def thinking(prompt: str) -> str:
    """`12 + 7 + 45 =` column by column, each line a column, its partial sums in turn: `2+7=9,9+5=14`."""
    numbers = [int(number) for number in prompt.removesuffix(" =").split(" + ")]
    lines, carry = [], None
    for place in (1, 10):
        digits = [number // place % 10 for number in numbers]
        total, *others = digits if carry is None else [carry, *digits]
        steps = []
        for digit in others:
            steps.append(f"{total}+{digit}={total + digit}")
            total += digit
        lines.append(",".join(steps))
        carry = total // 10
    return "\n".join(lines) + "\n"


def _items() -> Iterator[tuple[str, str]]:
    for item in arithmetic_items(COUNT, seed=SEED, difficulty=SUMS, part="train"):
        yield item.prompt, item.answer


def worked() -> Iterator[dict[str, Any]]:
    """Rows to tune on: a sum, its thinking, its answer. Of every third sum the thinking is cut anywhere, so that the model
    learns to answer after half of it, and after none."""
    generator = random.Random(SEED)
    for number, (prompt, answer) in enumerate(_items()):
        thought = thinking(prompt)
        if number % 3 == 0:
            thought = thought[: generator.randrange(len(thought))]
        yield _row(prompt, f"<think>\n{thought}</think>\n\n{answer}")


def at_once() -> Iterator[dict[str, Any]]:
    """The same sums with their answers alone."""
    for prompt, answer in _items():
        yield _row(prompt, answer)


def texts() -> Iterator[dict[str, str]]:
    """The words of the conversations, from which the tokenizer learns its tokens."""
    for row in worked():
        question, answer = row["messages"]
        text = f"user\n{question['content']}\nassistant\n{answer['content']}\n"
        yield {"id": question["content"], "text": text}


def _row(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
