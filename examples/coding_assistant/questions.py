"""Conversations about a checkout, made of its docstrings: `python questions.py [FOLDER]` writes questions.jsonl.

Needs no package.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST_ANSWER = 400  # characters: with its question it fits a row


def questions(source: str) -> Iterator[tuple[str, str]]:
    """What each documented public function of a file does, and the code behind that description."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        sentence = paragraph.partition(". ")[0].rstrip(".")
        if len(sentence) < 15:
            continue
        parameters = ", ".join(argument.arg for argument in node.args.args if argument.arg != "self")
        yield f"What does `{node.name}({parameters})` do?", f"{sentence}."
        yield f"Write a Python function `{node.name}({parameters})`. {sentence}.", f"```python\n{ast.unparse(node)}\n```"


folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("../../src/bessemer")
answers: dict[str, set[str]] = {}
for file in sorted(folder.rglob("*.py")):
    for question, answer in questions(file.read_text(encoding="utf-8")):
        answers.setdefault(question, set()).add(answer)
with Path("questions.jsonl").open("w", encoding="utf-8") as stream:
    for question, given in answers.items():
        (answer, *others) = given
        if not others and len(answer) <= LONGEST_ANSWER:  # a question has one answer
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
