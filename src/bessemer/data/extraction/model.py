"""Model of main text: two small ensembles of oblivious trees over a block's features, one after the other.

In an oblivious tree all nodes of one level ask the same question, so that a tree of depth d is d questions and 2^d answers:
few numbers to fit on few pages, and a look-up without branches. The first ensemble judges every block by its `FEATURES`; the
second has those and the first one's answers for the blocks around it and inside its ancestors, which bridges a short line
between two paragraphs and drops a lone sentence in a footer.
"""

from __future__ import annotations

import json
from base64 import b64decode
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.data.extraction.blocks import CHARACTERS, GROUP
from bessemer.data.extraction.parsing import Page
from bessemer.data.extraction.vocabulary import BLOCK, CUES, HEADING, NUMBER, ROLE_BIT, ROLES, TRAITS
from bessemer.data.text.compiled import compiled

#: Kinds of elements whose distance above a block is a feature.
_ANCESTOR_TAGS = (
    "nav", "header", "footer", "aside", "article", "main", "form", "figure", "ul", "ol",
    "dl", "table", "blockquote", "section", "p", "pre", "details",
)  # fmt: skip
_TAG_KINDS = (
    ("p",),
    ("li",),
    ("h1",),
    ("h2",),
    ("h3", "h4", "h5", "h6"),
    ("td", "th"),
    ("pre", "listing"),
    ("div", "section", "article", "main", "center", "body"),
    ("figcaption", "caption"),
    ("dt", "dd"),
    ("header", "footer", "nav", "aside", "address", "ul", "ol", "form", "label", "legend", "fieldset", "summary"),
    ("blockquote",),
)
#: Roles that the class of the whole page may name.
PAGE_ROLES = ("article", "forum", "teaser", "product")
#: How far up the surroundings are measured, in block-level ancestors.
LEVELS = 4
#: How many blocks before and after are looked at.
REACH = 3
FAR = 40

_TEXT_FEATURES = """
    characters words word_length link_density links sentence_ends sentence_density commas digit_share capital_share closed
    title_share repeated depth block_position text_position after_h1 since_h1 since_heading
"""
_SHAPE_FEATURES = "function_share symbol_share strong_share slanted_share media_before media_after"
_GROUP_FEATURES = "group_blocks group_characters group_links group_share article_share"
_PAGE_FEATURES = """
    candidate_in candidate_score candidate_apart candidate_share candidate_before candidate_after siblings_alike page_blocks
    page_characters page_link_density page_prose page_has_article page_has_main page_articles
"""
FEATURES: tuple[str, ...] = (
    *_TEXT_FEATURES.split(),
    *(f"is_{kind[0]}" for kind in _TAG_KINDS),
    *(f"role_{role}" for role in ROLES),
    *(f"in_{tag}" for tag in _ANCESTOR_TAGS),
    *(f"cue_{cue}" for cue in CUES),
    *(f"section_{cue}" for cue in CUES),
    *(f"since_{cue}" for cue in CUES),
    *(f"until_{cue}" for cue in CUES),
    *(
        f"{what}_{level}"
        for level in range(1, LEVELS + 1)
        for what in ("chars_up", "links_up", "share_up", "blocks_up", "prose_up")
    ),
    *(
        f"{what}_{place}"
        for place in [*range(-REACH, 0), *range(1, REACH + 1)]
        for what in ("chars_at", "links_at", "ends_at", "same_at")
    ),
    *_SHAPE_FEATURES.split(),
    *(f"first_{cue}" for cue in CUES),
    *_GROUP_FEATURES.split(),
    *(f"word_score_{place}" for place in ("here", -2, -1, 1, 2)),
    *_PAGE_FEATURES.split(),
    *(f"page_is_{role}" for role in PAGE_ROLES),
)

KIND_OF_TAG = np.full(len(TRAITS), -1, np.int64)
for _number, _kind in enumerate(_TAG_KINDS):
    for _name in _kind:
        if _name in NUMBER:
            KIND_OF_TAG[NUMBER[_name]] = _number
ANCESTOR_OF_TAG = np.full(len(TRAITS), -1, np.int64)
for _number, _name in enumerate(_ANCESTOR_TAGS):
    ANCESTOR_OF_TAG[NUMBER[_name]] = _number
H1, ARTICLE, MAIN = NUMBER["h1"], NUMBER["article"], NUMBER["main"]
N_ROLES, N_TAGS = len(ROLES), len(_ANCESTOR_TAGS)


def _mask(*names: str) -> int:
    return sum(ROLE_BIT[name] for name in names)


GOOD = _mask("body", "article", "main", "forum", "product", "lead")
BAD = _mask(
    "comment", "navigation", "breadcrumb", "footer", "sidebar", "related", "share", "advertising", "consent", "author_box",
    "subscribe", "popup", "pagination", "search", "signature",
)  # fmt: skip
# Where groups of columns begin.
KINDS_AT = FEATURES.index(f"is_{_TAG_KINDS[0][0]}")
NEAR_AT = FEATURES.index(f"role_{next(iter(ROLES))}")
CUES_AT = FEATURES.index(f"cue_{next(iter(CUES))}")
SINCE_AT = FEATURES.index(f"since_{next(iter(CUES))}")
UP_AT = FEATURES.index("chars_up_1")
SHAPE_AT = FEATURES.index("function_share")
GROUP_AT = FEATURES.index("group_blocks")
WORDS_AT = FEATURES.index("word_score_here")
CANDIDATE_AT = FEATURES.index("candidate_in")
PAGE_AT = FEATURES.index("page_blocks")


#: Raised with every fit of `model.json`, and whenever a feature is computed otherwise under the same name.
MODEL_VERSION = 2
#: How far around a block the second ensemble looks, and how many ancestors up.
ANSWER_REACH, ANSWER_LEVELS = 4, 5

_ANSWER_SUMS = "mass_before mass_after since_sure until_sure answer_page section_answer group_answer group_caught"
#: Inputs of the second ensemble, behind `FEATURES`.
CONTEXT: tuple[str, ...] = (
    "answer",
    *(f"answer_at_{place}" for place in [*range(-ANSWER_REACH, 0), *range(1, ANSWER_REACH + 1)]),
    *(f"answer_up_{level}" for level in range(1, ANSWER_LEVELS + 1)),
    *(f"caught_up_{level}" for level in range(1, ANSWER_LEVELS + 1)),
    *_ANSWER_SUMS.split(),
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
    page: Page,
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
    tags, parents, block_elements = page.tags, page.parents, page.block_elements
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
        for offset in range(-ANSWER_REACH, ANSWER_REACH + 1):
            if offset:
                other = block + offset
                rows[block, column] = answers[other] if 0 <= other < blocks else -0.1
                column += 1
        above = element
        for level in range(ANSWER_LEVELS):
            inner = above
            while above > 0 and (held[above] == held[inner] or not traits[tags[above]] & BLOCK):
                above = parents[above]
            rows[block, column + level] = (mass[above] - answers[block] * weight) / max(size[above] - weight, 1.0)
            rows[block, column + ANSWER_LEVELS + level] = mass[above] / whole
        column += 2 * ANSWER_LEVELS
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
    """Inputs of the second ensemble for each block, (B, F + C) float32, given its `FEATURES` and counts."""
    headings = (TRAITS[page.tags[page.block_elements]] & HEADING) != 0
    around = np.zeros((len(rows), len(CONTEXT)), np.float32)
    sums, groups = np.zeros((3, len(page.tags))), np.zeros((2, int(counts[:, GROUP].max(initial=0)) + 1))
    describe_context(answers, counts, page, headings, TRAITS, sums, groups, around)
    return np.concatenate([rows, around], axis=1)


def judge(rows: np.ndarray, counts: np.ndarray, page: Page, model: Model) -> np.ndarray:
    """The probability that each block belongs to the main text, (B,) float64, given its `FEATURES` and counts."""
    answers = probabilities(rows, model.first)
    return probabilities(second_rows(answers, rows, counts, page), model.second)


def from_json(text: str) -> Model:
    """A model from its JSON. Raises ArtefactError where it was fitted on other features than this code computes."""

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
