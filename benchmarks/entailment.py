"""How well an entailment head over a language model's opinion tells which statements a passage bears out, beside shared words.

    python benchmarks/entailment.py --index INDEX --model NAME=MODEL [--model NAME=MODEL] [--passages 50]  # minutes of a core

INDEX is one of the standard library's documentation (`bessemer index python_docs INDEX`). Of each model a head is trained on
pairs made from it (`retrieval/entailment.py`), and asked about the statements of `entailment_pairs.json`, which were written by
hand and committed before a first head was trained: in other words than their passages, and with what is wrong named. AUC is how
often a supported statement has more than an unsupported one; its intervals, and those of its distance from that of the share of
content words, hold 95 % of 2,000 draws of passages with replacement. Marked is what is below the limits that answers use. ECE
is the expected calibration error of the statements over ten bins (Guo et al. 2017); those by which heads are calibrated are
others (`retrieval/entailment_statements.json`).

Nothing is timed. Result: `entailment.json`.
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

from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.retrieval.citations import ENTAILED, SUPPORT  # noqa: E402
from bessemer.retrieval.entailment import FEATURES, Opinions, features, head_of  # noqa: E402
from bessemer.retrieval.entailment_pairs import Pair, make_pairs, written_pairs  # noqa: E402
from bessemer.retrieval.index import open_index  # noqa: E402
from bessemer.retrieval.terms import compared_words  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/retrieval/entailment.py",
    "src/bessemer/retrieval/entailment_pairs.py",
    "src/bessemer/retrieval/entailment_statements.json",
    "benchmarks/entailment_pairs.json",
)

PAIRS = Path(__file__).with_name("entailment_pairs.json")
_BINS, _DRAWS, _AT_ONCE = 10, 2000, 20


def overlap(statement: str, passage: str) -> float:
    """The share of a statement's content words that a passage has."""
    known, own = set(compared_words(passage)), compared_words(statement)
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


def drawn(groups_N: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Places of statements, for draws of whole passages with replacement."""
    draw, names = np.random.default_rng(seed), np.unique(groups_N)
    members = [np.flatnonzero(groups_N == name) for name in names]
    return [np.concatenate([members[one] for one in draw.integers(0, len(names), len(names))]) for _ in range(_DRAWS)]


def interval(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def asked(opinions: Opinions, pairs: Sequence[Pair], label: str) -> np.ndarray:
    """The opinions of pairs, some at a time, with a line of progress for each."""
    found = []
    for first in range(0, len(pairs), _AT_ONCE):
        found.append(opinions.of([(one.sentence, one.source) for one in pairs[first : first + _AT_ONCE]]))
        print(f"{label}: {first + len(found[-1])} of {len(pairs)}", flush=True)
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, help="NAME=MODEL")
    parser.add_argument("--passages", type=int, default=50)
    arguments = parser.parse_args()
    tested, written = written_pairs(PAIRS), written_pairs()
    made = [pair for _, pair in make_pairs(open_index(arguments.index), arguments.passages)]
    pairs = [(one.sentence, one.source) for one in tested]
    wanted_N, kinds = np.array([one.supported for one in tested]), np.array([one.kind for one in tested])
    draws = drawn(np.array([one.source for one in tested]))
    shares_N = np.array([overlap(*pair) for pair in pairs])

    def judged(values_N: np.ndarray, limit: float) -> dict[str, Any]:
        is_marked_N = values_N < limit
        areas = [area(values_N[some], wanted_N[some]) for some in draws]
        beyond = [own - area(shares_N[some], wanted_N[some]) for own, some in zip(areas, draws, strict=True)]
        return {
            "auc": area(values_N, wanted_N),
            "auc_interval": interval(areas),
            "beyond_words": area(values_N, wanted_N) - area(shares_N, wanted_N),
            "beyond_words_interval": interval(beyond),
            "unsupported_marked": float(is_marked_N[~wanted_N].mean()),
            "supported_marked": float(is_marked_N[wanted_N].mean()),
        }

    figures: dict[str, Any] = {
        "statements": len(pairs),
        "supported": int(wanted_N.sum()),
        "pairs": len(made),
        "calibrated_on": len(written),
        "words": judged(shares_N, SUPPORT),
    }
    table = [("share of content words", *_cells(figures["words"]), None)]
    for name, model in (one.split("=", 1) for one in arguments.model):
        with Engine(Path(model), device="cpu") as engine:
            opinions = Opinions(engine)
            made_N = asked(opinions, made, f"{name}, pairs made")
            written_N = asked(opinions, written, f"{name}, statements that calibrate")
            tested_N = asked(opinions, tested, f"{name}, statements that test")
        head = head_of(made, made_N, written, written_N, {})
        probabilities_N = head.probabilities(features(pairs, tested_N))
        figures[name] = {
            "opinion": judged(tested_N, 0.0),
            "head": judged(probabilities_N, ENTAILED),
            "weights": dict(zip(FEATURES, head.fitted.weights_F.tolist(), strict=True)),
            "ece": calibration_error(probabilities_N, wanted_N),
            "auc_of_made": area(made_N, np.array([one.supported for one in made])),
            "kinds": {
                kind: {
                    "statements": int((kinds == kind).sum()),
                    "marked": float((probabilities_N < ENTAILED)[kinds == kind].mean()),
                }
                for kind in sorted(set(kinds.tolist()))
            },
        }
        table.append((f"opinion of {name}", *_cells(figures[name]["opinion"]), None))
        table.append((f"head over it, {name}", *_cells(figures[name]["head"]), figures[name]["ece"]))
    columns = [
        ("by", ""),
        ("AUC", ".2f"),
        ("95 % interval", ""),
        ("of the false, marked", ".0%"),
        ("of the true, marked", ".0%"),
    ]
    columns.append(("ECE", ".2f"))
    print(json.dumps(figures, indent=1), *table, sep="\n")
    print(recording.save("entailment", figures, tables={"heads": recording.table(columns, table)}))


def _cells(found: dict[str, Any]) -> tuple[Any, ...]:
    low, high = found["auc_interval"]
    return found["auc"], f"{low:.2f} to {high:.2f}", found["unsupported_marked"], found["supported_marked"]


if __name__ == "__main__":
    main()
