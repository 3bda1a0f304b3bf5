"""Precision and recall of the scores `spam`, `toxicity` and `model_written` on documents that we marked ourselves.

    python benchmarks/labels.py [--data ../shared/data] [--part test|tune|all] [--fit]

`marks/written.jsonl` holds texts written for this purpose, with their label. `marks/others.jsonl` holds only names, hashes and
labels of texts that lie elsewhere: dialogues and pages below `--data`, docstrings of the standard library. Those not found
there, or found changed, are left out and counted. A hash of a document's id decides whether it is in the part that the
scores were tuned on or in the one that they are judged by. `--fit` prints the coefficients of `filters/word_list_scores.py`
from the part `tune`. Result: `labels.json`, of both parts; the documents by style are printed of `--part`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import recording
from bessemer.core.hashing import hash_bytes
from bessemer.data.filters.word_list_scores import FEATURES, model_written, spam, spam_features, toxicity
from bessemer.data.text.texts import Texts

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data/filters", "src/bessemer/data/word_lists", "src/bessemer/data/thresholds.py")

MARKS = Path(__file__).parent / "marks"
#: A text is what the score says above one half: the default limits.
LIMIT = 0.5
#: What is judged, and its name in the tables.
KINDS = {"spam": "spam", "toxicity": "toxicity", "model_written": "model-written"}
PAGE_CHARACTERS = 3000
CHUNK_CHARACTERS = 900


@dataclass(frozen=True)
class Marked:
    id: str
    kind: str
    style: str
    label: bool
    text: str

    @property
    def part(self) -> str:
        return "tune" if int(hash_bytes(self.id.encode(), bits=64), 16) % 2 else "test"


def marked_documents(data: Path) -> tuple[list[Marked], int]:
    """All marked documents whose text is at hand, and how many are not."""
    found = [Marked(**json.loads(line)) for line in (MARKS / "written.jsonl").open(encoding="utf-8")]
    missing = 0
    for line in (MARKS / "others.jsonl").open(encoding="utf-8"):
        mark = json.loads(line)
        text = text_of(mark["text"], data)
        if text is None or hash_bytes(text.encode(), bits=64) != mark.pop("hash"):
            missing += 1
        else:
            found.append(Marked(**mark | {"text": text}))
    return found, missing


def text_of(name: str, data: Path) -> str | None:
    """The text that a name such as `harmless:12:human` or `page:blog.python.org` stands for."""
    source, _, rest = name.partition(":")
    try:
        if source == "harmless":
            number, speaker = rest.split(":")
            turns = re.findall(rf"\n\n{speaker}: ?(.*?)(?=\n\n(?:Human|Assistant):|\Z)", dialogues(data)[int(number)], re.S)
            return "\n".join(turn.strip() for turn in turns) if speaker == "Human" else turns[-1].strip()
        if source == "page":
            return page(data / "html" / f"{rest}.html")
        if source == "shakespeare":
            plays = (data / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
            return plays[int(rest) * CHUNK_CHARACTERS :][:CHUNK_CHARACTERS]
        if source == "maths":
            return json.loads((data / "sft/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[int(rest)])["question"]
        return importlib.import_module(rest).__doc__ if source == "module" else None
    except (OSError, IndexError, ImportError, KeyError):
        return None


@cache
def dialogues(data: Path) -> list[str]:
    lines = (data / "preference/hh_harmless_1800.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["chosen"] for line in lines]


@cache
def page(file: Path) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(file.read_text(encoding="utf-8", errors="replace"), main_content=True)[:PAGE_CHARACTERS]


def scores(documents: list[Marked]) -> np.ndarray:
    """Each document's score of its own kind."""
    texts = Texts.of([document.text for document in documents])
    toxic = toxicity(texts)
    by_kind = {
        "spam": spam(texts)["spam_score"].to_numpy(),
        "toxicity": np.maximum(toxic["toxicity_score"].to_numpy(), toxic["toxicity_nsfw"].to_numpy()),
        "model_written": model_written(texts)["model_written_score"].to_numpy(),
    }
    return np.array([by_kind[document.kind][number] for number, document in enumerate(documents)])


def measured(labels: np.ndarray, scored: np.ndarray) -> dict[str, float]:
    """Precision and recall at the default limit, and the area under the ROC curve (Mann and Whitney's U)."""
    said = scored > LIMIT
    right = (said & labels).sum()
    above = (scored[labels][:, None] > scored[~labels]).mean() + 0.5 * (scored[labels][:, None] == scored[~labels]).mean()
    return {
        "documents": len(labels),
        "positive": int(labels.sum()),
        "precision": float(right / max(said.sum(), 1)),
        "recall": float(right / max(labels.sum(), 1)),
        "auc": float(above),
    }


def fit_spam(documents: list[Marked]) -> None:
    """Print the coefficients of a logistic regression (L2 0.1, not negative, by projected gradient steps)."""
    chosen = [document for document in documents if document.kind == "spam" and document.part == "tune"]
    features = spam_features(Texts.of([document.text for document in chosen]))
    labels = np.array([document.label for document in chosen], float)
    weights, bias = np.zeros(features.shape[1]), 0.0
    for _ in range(20_000):
        error = 1 / (1 + np.exp(-(features @ weights + bias))) - labels
        weights = np.maximum(weights - 0.1 * (features.T @ error + 0.1 * weights) / len(labels), 0)
        bias -= 0.1 * error.mean()
    print("coefficients", dict(zip(FEATURES, weights.round(2).tolist(), strict=True)), "intercept", round(bias, 2))


def by_kind(documents: list[Marked], scored: np.ndarray) -> dict[str, dict[str, float]]:
    """The figures of each kind of documents."""
    labels, kinds = (np.array([getattr(document, name) for document in documents]) for name in ("label", "kind"))
    return {kind: measured(labels[kinds == kind], scored[kinds == kind]) for kind in KINDS}


def by_style(documents: list[Marked], scored: np.ndarray) -> dict[str, dict[str, dict[str, int]]]:
    """By kind and style how many documents there are, how many are positive, and how many are judged rightly."""
    found: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in KINDS}
    for document, score in zip(documents, scored, strict=True):
        counts = found[document.kind].setdefault(document.style.replace(" ", "_"), {"documents": 0, "positive": 0, "right": 0})
        counts["documents"] += 1
        counts["positive"] += document.label
        counts["right"] += bool(score > LIMIT) == document.label
    return {kind: dict(sorted(styles.items())) for kind, styles in found.items()}


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    columns = [
        ("", ""),
        ("documents", ",.0f"),
        ("positive", ",.0f"),
        ("precision", ".2f"),
        ("recall", ".2f"),
        ("area under ROC", ".2f"),
    ]
    return {
        part: recording.table(columns, [(KINDS[kind], *found.values()) for kind, found in figures[part].items()])
        for part in ("test", "tune")
    }


def show(documents: list[Marked], scored: np.ndarray, *, errors: bool) -> None:
    """Print how many of each style are judged rightly; errors: and the documents that are not."""
    styles = by_style(documents, scored)
    for kind, found in by_kind(documents, scored).items():
        print(f"{kind:14} " + "  ".join(f"{name} {value:.3g}" for name, value in found.items()))
        for style, counts in styles[kind].items():
            print(f"    {style:14} {counts['right']} of {counts['documents']} right ({counts['positive']} positive)")
    for document, score in zip(documents, scored, strict=True):
        if errors and (score > LIMIT) != document.label:
            verdict = "missed" if document.label else "wrong"
            print(f"{score:.2f} {verdict} {document.id} {document.style}: {document.text[:160]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--part", choices=("test", "tune", "all"), default="test")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--errors", action="store_true", help="print the documents that were judged wrongly")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        recording.not_run(f"there are no dialogues and pages in {arguments.data.name}: name their folder with --data")
    documents, missing = marked_documents(arguments.data)
    if arguments.fit:
        fit_spam(documents)
    scored = scores(documents)
    parts = {part: np.array([document.part == part for document in documents]) for part in ("test", "tune")}
    shown = np.ones(len(documents), bool) if arguments.part == "all" else parts[arguments.part]
    show([documents[place] for place in np.flatnonzero(shown)], scored[shown], errors=arguments.errors)
    figures: dict[str, Any] = {"documents": len(documents), "missing": missing}
    for part, chosen in parts.items():
        these = [documents[place] for place in np.flatnonzero(chosen)]
        figures[part] = by_kind(these, scored[chosen])
        figures[f"{part}_by_style"] = by_style(these, scored[chosen])
    left_out = f"{missing} marked documents were not at hand, or are changed, and are left out." if missing else None
    print(left_out or "all marked documents are at hand")
    print(recording.save("labels", figures, tables=tables(figures), note=left_out))


if __name__ == "__main__":
    main()
