"""Model of main text: two small ensembles of oblivious trees, of which the second reads the answers of the first.

In an oblivious tree all nodes of one level ask the same question, so that a tree of depth d is d questions and 2^d answers:
few numbers to fit on few pages, and a look-up without branches to evaluate. The first ensemble judges every block by its
`FEATURES`; the second has those and what the first said of the blocks around it and inside its ancestors, which is what
bridges a short line between two paragraphs and drops a lone sentence in a footer.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.data.extraction.block_counts import CHARACTERS, GROUP
from bessemer.data.extraction.feature_columns import FEATURES
from bessemer.data.extraction.parsing import Page
from bessemer.data.extraction.tags import BLOCK, HEADING, TRAITS
from bessemer.data.text.compiled import compiled

#: Raised with every fit of `model.json`, and whenever a feature is computed otherwise under the same name.
MODEL_VERSION = 2
#: How far around a block the second ensemble looks, and how many ancestors up.
REACH, LEVELS = 4, 5

#: What the second ensemble sees beside `FEATURES`.
CONTEXT: tuple[str, ...] = (
    "answer",
    *(f"answer_at_{place}" for place in [*range(-REACH, 0), *range(1, REACH + 1)]),
    *(f"answer_up_{level}" for level in range(1, LEVELS + 1)),
    *(f"caught_up_{level}" for level in range(1, LEVELS + 1)),
    "mass_before",
    "mass_after",
    "since_sure",
    "until_sure",
    "answer_page",
    "section_answer",
    "group_answer",
    "group_caught",
)
_UNTIL_AT = CONTEXT.index("until_sure")


class Trees(NamedTuple):
    """An ensemble: the questions of each tree, (T, D) `features` and `thresholds`, and its answers, (T, 2^D) log-odds."""

    features: np.ndarray
    thresholds: np.ndarray
    answers: np.ndarray
    bias: float


class Model(NamedTuple):
    """Both ensembles, the probability from which on a block belongs to the main text, and the weights of words, (BUCKETS,)."""

    first: Trees
    second: Trees
    threshold: float
    words: np.ndarray


@compiled
def add_answers(
    rows: np.ndarray, features: np.ndarray, thresholds: np.ndarray, answers: np.ndarray, bias: float, result: np.ndarray
) -> None:
    """Fills `result`, (B,), with the ensemble's probability for each row, added up in the order of the trees."""
    trees, depth = features.shape
    for row in range(len(rows)):
        total = bias
        for tree in range(trees):
            leaf = 0
            for level in range(depth):
                leaf = 2 * leaf + (rows[row, features[tree, level]] > thresholds[tree, level])
            total += answers[tree, leaf]
        result[row] = 1.0 / (1.0 + np.exp(-total))


@compiled
def describe_context(
    answers: np.ndarray,
    counts: np.ndarray,
    tags: np.ndarray,
    parents: np.ndarray,
    block_elements: np.ndarray,
    headings: np.ndarray,
    traits: np.ndarray,
    sums: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Fills `rows`, (B, C), with `CONTEXT` of each block, from the first ensemble's `answers`, (B,).

    `sums`, (3, N) of zeros, is scratch: of each element what is answered below it, how much there is, and how many blocks;
    `groups`, (2, G) of zeros, the same of the blocks of one signature.
    """
    blocks = len(answers)
    elements = len(parents)
    mass, size, held = sums[0], sums[1], sums[2]
    characters, group = counts[:, CHARACTERS], counts[:, GROUP]
    for block in range(blocks):
        element = block_elements[block]
        weight = min(characters[block], 400) + 5.0
        groups[0, group[block]] += answers[block] * weight
        groups[1, group[block]] += weight
        mass[element] += answers[block] * weight
        size[element] += weight
        held[element] += 1
    for element in range(elements - 1, 0, -1):
        mass[parents[element]] += mass[element]
        size[parents[element]] += size[element]
        held[parents[element]] += held[element]
    whole = max(mass[0], 1e-9)
    before = 0.0
    since = 99
    section = 0.0
    for block in range(blocks):
        element = block_elements[block]
        weight = min(characters[block], 400) + 5.0
        rows[block, 0] = answers[block]
        column = 1
        for offset in range(-REACH, REACH + 1):
            if offset:
                other = block + offset
                rows[block, column] = answers[other] if 0 <= other < blocks else -0.1
                column += 1
        above = element
        for level in range(LEVELS):
            inner = above
            while above > 0 and (held[above] == held[inner] or not traits[tags[above]] & BLOCK):
                above = parents[above]
            rows[block, column + level] = (mass[above] - answers[block] * weight) / max(size[above] - weight, 1.0)
            rows[block, column + LEVELS + level] = mass[above] / whole
        column += 2 * LEVELS
        rows[block, column] = before / whole
        before += answers[block] * weight
        rows[block, column + 1] = 1.0 - before / whole
        rows[block, column + 2] = since
        since = 0 if answers[block] > 0.8 and characters[block] > 80 else min(99, since + 1)
        rows[block, column + 4] = whole / max(size[0], 1.0)
        if headings[block]:
            section = answers[block]
        rows[block, column + 5] = section
        caught, there = groups[0, group[block]], groups[1, group[block]]
        rows[block, column + 6] = (caught - answers[block] * weight) / (there - weight) if there > weight + 1.0 else -0.1
        rows[block, column + 7] = caught / whole
    until = 99
    for block in range(blocks - 1, -1, -1):
        rows[block, _UNTIL_AT] = until
        until = 0 if answers[block] > 0.8 and characters[block] > 80 else min(99, until + 1)


def probabilities(rows: np.ndarray, trees: Trees) -> np.ndarray:
    """The ensemble's probability for each row, (B,) float64."""
    result = np.empty(len(rows))
    add_answers(rows, *trees, result)
    return result


def second_rows(answers: np.ndarray, rows: np.ndarray, counts: np.ndarray, page: Page) -> np.ndarray:
    """What the second ensemble sees of each block, (B, F + C) float32, given its `FEATURES` and `COUNTS`."""
    headings = (TRAITS[page.tags[page.block_elements]] & HEADING) != 0
    around = np.zeros((len(rows), len(CONTEXT)), np.float32)
    sums, groups = np.zeros((3, len(page.tags))), np.zeros((2, int(counts[:, GROUP].max(initial=0)) + 1))
    describe_context(
        answers, counts, page.tags, page.parents, page.block_elements, headings, TRAITS, sums, groups, around
    )  # fmt: skip
    return np.concatenate([rows, around], axis=1)


def judge(rows: np.ndarray, counts: np.ndarray, page: Page, model: Model) -> np.ndarray:
    """The probability that each block belongs to the main text, (B,) float64, given its `FEATURES` and `COUNTS`."""
    answers = probabilities(rows, model.first)
    return probabilities(second_rows(answers, rows, counts, page), model.second)


def to_json(model: Model) -> str:
    """The model as text: one line a tree."""

    def ensemble(trees: Trees) -> dict[str, Any]:
        lines = [
            [feature.tolist(), [float(f"{value:.6g}") for value in threshold], [float(f"{value:.4g}") for value in answer]]
            for feature, threshold, answer in zip(trees.features, trees.thresholds, trees.answers, strict=True)
        ]
        return {"bias": float(f"{trees.bias:.6g}"), "trees": lines}

    scale = max(float(np.abs(model.words).max()), 1e-6) / 127
    content = {
        "version": MODEL_VERSION,
        "inputs": [*FEATURES, *CONTEXT],
        "threshold": model.threshold,
        "words": [float(f"{scale:.6g}"), b64encode(np.rint(model.words / scale).astype(np.int8).tobytes()).decode()],
        "first": ensemble(model.first),
        "second": ensemble(model.second),
    }
    return json.dumps(content, separators=(",", ":")).replace("[[[", "[\n[[").replace("]],[[", "]],\n[[") + "\n"


def from_json(text: str) -> Model:
    """The model that `to_json` wrote. Raises ArtefactError where it was fitted on other features than this code computes."""

    def ensemble(content: dict[str, Any]) -> Trees:
        features, thresholds, answers = zip(*content["trees"], strict=True)
        return Trees(
            np.array(features, np.int64), np.array(thresholds, np.float32), np.array(answers, np.float64), content["bias"]
        )

    content = json.loads(text)
    if content.get("version") != MODEL_VERSION or content["inputs"] != [*FEATURES, *CONTEXT]:
        raise ArtefactError("the model of main text was fitted on other features than this version computes")
    scale, codes = content["words"]
    words = (np.frombuffer(b64decode(codes), np.int8) * scale).astype(np.float32)
    return Model(ensemble(content["first"]), ensemble(content["second"]), content["threshold"], words)


@cache
def trained() -> Model:
    """The model that comes with the package."""
    return from_json(resources.files("bessemer.data.extraction").joinpath("model.json").read_text(encoding="utf-8"))
