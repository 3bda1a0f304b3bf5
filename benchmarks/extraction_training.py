"""Training of the model of blocks on marked pages: deterministic gradient boosting of oblivious trees.

Each tree is grown level by level. At every level the question (a feature and a threshold) is the one under which the sum of
G² / (H + λ) over all leaves is largest, where G and H are sums of the logistic loss's first and second derivatives
(Friedman 2001; the second-order form is Chen and Guestrin's, 2016; one question per level as in CatBoost,
Prokhorenkova et al. 2018).
"""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any, NamedTuple

import numpy as np

from bessemer.data.extraction.block_text import block_text
from bessemer.data.extraction.blocks import BUCKETS, CHARACTERS, MOST_HASHED, score_words, word_scores
from bessemer.data.extraction.extract import letters
from bessemer.data.extraction.features import features, put_word_scores
from bessemer.data.extraction.model import CONTEXT, FEATURES, MODEL_VERSION, Model, Trees, probabilities, second_rows
from bessemer.data.extraction.parsing import Page, parse
from bessemer.data.text.compiled import compiled, compiled_allocating

#: Thresholds tried for each feature: quantiles of its values.
_BINS = 64
#: What a block counts that holds a marked phrase. All blocks of one side of a page count 100 together.
WEIGHT_OF_PHRASE = 33.0
#: Of these weights, what the step of a word's weight is multiplied by.
_WEIGHT_OF_WORDS = 1 / 8

#: Passes of gradient descent over the words, its step, and its pull of every weight towards zero.
_PASSES, _RATE, _DECAY = 6, 0.1, 1e-4
_TITLE_SHARE, _IS_CELL = FEATURES.index("title_share"), FEATURES.index("is_td")


class MarkedPage(NamedTuple):
    """A page with a target for each block, 1 main text, 0 not, -1 not decided, and how much the page counts.

    `sure`, (B,) bool: the blocks that a reader named one by one, of which each counts at least `WEIGHT_OF_PHRASE`.
    """

    data: np.ndarray
    page: Page
    targets: np.ndarray
    weight: float = 1.0
    sure: np.ndarray | None = None


@compiled
def _descend(
    buckets: np.ndarray,
    targets: np.ndarray,
    importance: np.ndarray,
    order: np.ndarray,
    weights: np.ndarray,
    squares: np.ndarray,
    bias: np.ndarray,
) -> None:
    """One pass of stochastic gradient descent with Adagrad's steps; `bias`, (2,): the constant and its sum of squares."""
    for row in order:
        hashed = 0
        total = 0.0
        while hashed < buckets.shape[1] and buckets[row, hashed] >= 0:
            total += weights[buckets[row, hashed]]
            hashed += 1
        scale = 1.0 / np.sqrt(max(1, hashed))
        slope = (1.0 / (1.0 + np.exp(-(total * scale + bias[0]))) - targets[row]) * importance[row]
        for index in range(hashed):
            bucket = buckets[row, index]
            step = slope * scale + _DECAY * weights[bucket]
            squares[bucket] += step * step
            weights[bucket] -= _RATE * step / np.sqrt(squares[bucket] + 1e-6)
        bias[1] += slope * slope
        bias[0] -= _RATE * slope / np.sqrt(bias[1] + 1e-6)


def fit_words(buckets: np.ndarray, targets: np.ndarray, importance: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weights, (BUCKETS,) float32, for blocks given by their `buckets`, (R, MOST_HASHED), with `targets` of 0 and 1, (R,)."""
    random = np.random.default_rng(seed)
    weights, squares, bias = np.zeros(BUCKETS), np.zeros(BUCKETS), np.zeros(2)
    for _ in range(_PASSES):
        _descend(buckets, targets, importance, random.permutation(len(buckets)), weights, squares, bias)
    return weights.astype(np.float32)


def buckets_of(data: np.ndarray, page: Page) -> np.ndarray:
    """The buckets of each block's words, (B, MOST_HASHED) int32, -1 where there are no more."""
    buckets = np.full((len(page.block_elements), MOST_HASHED), -1, np.int32)
    score_words(data, page, np.zeros(BUCKETS, np.float32), np.empty(len(buckets)), buckets)
    return buckets


def edges_of(rows: np.ndarray) -> list[np.ndarray]:
    """Of each feature the thresholds to try, halfway between neighbouring values where there are few."""
    found = []
    for column in rows.T:
        values = np.unique(column)
        if len(values) > _BINS:
            values = np.unique(np.quantile(column, np.linspace(0, 1, _BINS + 1)))
        found.append(((values[1:] + values[:-1]) / 2).astype(np.float32))
    return found


@compiled_allocating
def _best_question(
    binned: np.ndarray,
    leaves: np.ndarray,
    gradients: np.ndarray,
    hessians: np.ndarray,
    leaf_count: int,
    bins: np.ndarray,
    penalty: float,
) -> tuple[int, int]:
    """The feature and bin whose question gains most: those of the lowest number on a tie."""
    columns, rows = binned.shape
    best_gain = -1.0
    best_feature = best_bin = 0
    sums = np.zeros((leaf_count, _BINS + 1, 2))
    for feature in range(columns):
        if bins[feature] == 0:
            continue
        sums[:] = 0.0
        for row in range(rows):
            sums[leaves[row], binned[feature, row], 0] += gradients[row]
            sums[leaves[row], binned[feature, row], 1] += hessians[row]
        gains = np.zeros(bins[feature])
        for leaf in range(leaf_count):
            whole_g = whole_h = 0.0
            for bin_ in range(bins[feature] + 1):
                whole_g += sums[leaf, bin_, 0]
                whole_h += sums[leaf, bin_, 1]
            below_g = below_h = 0.0
            for bin_ in range(bins[feature]):
                below_g += sums[leaf, bin_, 0]
                below_h += sums[leaf, bin_, 1]
                above_g, above_h = whole_g - below_g, whole_h - below_h
                gains[bin_] += below_g * below_g / (below_h + penalty) + above_g * above_g / (above_h + penalty)
        for bin_ in range(bins[feature]):
            if gains[bin_] > best_gain:
                best_gain, best_feature, best_bin = gains[bin_], feature, bin_
    return best_feature, best_bin


def fit_trees(
    rows: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    trees: int = 150,
    depth: int = 5,
    rate: float = 0.1,
    penalty: float = 2.0,
    sample: float = 0.5,
    bag: float = 1.0,
    seed: int = 0,
) -> Trees:
    """An ensemble for `targets`, (R,) of 0 and 1, given `rows`, (R, F).

    Each tree sees a random `sample` of the features, and a random share `bag` of the rows.
    """
    random = np.random.default_rng(seed)
    edges = edges_of(rows)
    # a row goes right when its value is above the threshold, as in `probabilities`
    binned = np.stack(
        [np.searchsorted(edge, column, side="left").astype(np.uint8) for edge, column in zip(edges, rows.T, strict=True)]
    )
    bins = np.array([len(edge) for edge in edges])
    share = float((weights * targets).sum() / weights.sum())
    bias = float(np.log(share / (1 - share)))
    scores = np.full(len(rows), bias)
    asked = np.zeros((trees, depth), np.int64)
    thresholds = np.zeros((trees, depth), np.float32)
    answers = np.zeros((trees, 2**depth))
    for tree in range(trees):
        chances = 1 / (1 + np.exp(-scores))
        gradients, hessians = weights * (targets - chances), weights * chances * (1 - chances)
        columns = np.sort(random.permutation(rows.shape[1])[: max(1, round(sample * rows.shape[1]))])
        seen = np.flatnonzero(random.random(len(rows)) < bag)
        binned_here, gradients, hessians = binned[np.ix_(columns, seen)], gradients[seen], hessians[seen]
        leaves, leaves_here = np.zeros(len(rows), np.int64), np.zeros(len(seen), np.int64)
        for level in range(depth):
            column, bin_ = _best_question(binned_here, leaves_here, gradients, hessians, 2**level, bins[columns], penalty)
            feature = columns[column]
            asked[tree, level], thresholds[tree, level] = feature, edges[feature][bin_]
            leaves = 2 * leaves + (binned[feature] > bin_)
            leaves_here = leaves[seen]
        up = np.bincount(leaves_here, gradients, 2**depth)
        down = np.bincount(leaves_here, hessians, 2**depth)
        answers[tree] = rate * up / (down + penalty)
        scores += answers[tree][leaves]
    return Trees(asked, thresholds, answers, bias)


def weights_of(targets: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Every page counts the same, and so do its main text and the rest; long blocks count more, but not by their length."""
    weights = np.zeros(len(targets))
    for side in (0, 1):
        here = targets == side
        if here.any():
            size = np.sqrt(np.minimum(characters[here], 400) + 10.0)
            weights[here] = 100 * size / size.sum()
    return weights


def fit(pages: list[MarkedPage], *, folds: int = 3, threshold: float = 0.5, seed: int = 0, **settings: float) -> Model:
    """Both ensembles and the weights of words. The ensembles learn from weights that had not seen the page in question, and the
    second from answers of first ensembles that had not seen it either.
    """
    described = [features(page.data, page.page) for page in pages]
    rows = [row for row, _ in described]
    counts = [count for _, count in described]
    weights = []
    for page, count in zip(pages, counts, strict=True):
        weight = page.weight * weights_of(page.targets, count[:, CHARACTERS])
        weights.append(weight if page.sure is None else np.where(page.sure, np.maximum(weight, WEIGHT_OF_PHRASE), weight))
    group = np.random.default_rng(seed).permutation(len(pages)) % folds
    everything = list(range(len(pages)))
    words = [buckets_of(page.data, page.page) for page in pages]

    def words_fitted(chosen: list[int]) -> np.ndarray:
        known = [pages[n].targets >= 0 for n in chosen]
        return fit_words(
            np.concatenate([words[n][k] for n, k in zip(chosen, known, strict=True)]),
            np.concatenate([pages[n].targets[k] for n, k in zip(chosen, known, strict=True)]).astype(float),
            np.concatenate([weights[n][k] for n, k in zip(chosen, known, strict=True)]) * _WEIGHT_OF_WORDS,
            seed,
        )

    for fold in range(folds):
        word_weights = words_fitted([n for n in everything if group[n] != fold])
        for n in everything:
            if group[n] == fold:
                put_word_scores(rows[n], word_scores(pages[n].data, pages[n].page, word_weights))

    def fitted(chosen: list[int], inputs: list[np.ndarray], seed: int) -> Trees:
        known = [pages[n].targets >= 0 for n in chosen]
        return fit_trees(
            np.concatenate([inputs[n][k] for n, k in zip(chosen, known, strict=True)]),
            np.concatenate([pages[n].targets[k] for n, k in zip(chosen, known, strict=True)]).astype(float),
            np.concatenate([weights[n][k] for n, k in zip(chosen, known, strict=True)]),
            seed=seed,
            **settings,  # type: ignore[arg-type]
        )

    seconds: list[np.ndarray] = [np.empty(0)] * len(pages)
    for fold in range(folds):
        first = fitted([n for n in everything if group[n] != fold], rows, seed)
        for n in everything:
            if group[n] == fold:
                seconds[n] = second_rows(probabilities(rows[n], first), rows[n], counts[n], pages[n].page)
    return Model(fitted(everything, rows, seed), fitted(everything, seconds, seed + 1), threshold, words_fitted(everything))


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


def agreed(html: bytes, first: str, second: str, *, weight: float) -> MarkedPage | None:
    """An unmarked page, by two other extractors' texts of it: a block is main text where it is in both, not where it
    is in neither, and undecided where they differ. None where they differ too much for the page to teach anything.
    """
    data, page, texts = _blocks(html)
    blocks = [letters(text) for text in texts]
    sides = [({letters(line) for line in text.split("\n")}, letters(text)) for text in (first, second)]
    # a short block counts where it is a line of its own, a long one anywhere
    found = [
        [bool(block) and (block in lines or (len(block) > 15 and block in whole)) for lines, whole in sides] for block in blocks
    ]
    targets = np.array([1 if all(both) else -1 if any(both) else 0 for both in found], np.int64)
    sizes = np.array([len(block) for block in blocks])
    main, undecided = int(sizes[targets == 1].sum()), int(sizes[targets == -1].sum())
    few = (targets == 1).sum() < 4 or main < 500
    if few or main < 0.6 * len(sides[0][1]) or undecided > 0.5 * main:
        return None
    return MarkedPage(data, page, targets, weight)


def mark(html: bytes, main: set[str], undecided: set[str]) -> MarkedPage:
    """A page marked by the texts of its blocks, white space collapsed: those of the main text and those left open."""
    data, page, texts = _blocks(html)
    targets = np.array([1 if text in main else -1 if text in undecided else 0 for text in texts], np.int64)
    return MarkedPage(data, page, targets)


def by_phrases(html: bytes, belong: list[str], foreign: list[str], marked: MarkedPage | None = None) -> MarkedPage:
    """A page marked by phrases: a block with one of `foreign` is not main text, and of the blocks with one of `belong` the
    longest is. The others are as in `marked`, or not decided. A block that holds both kinds is not decided.
    """
    data, page, texts = _blocks(html)
    texts = [" ".join(text.split()) for text in texts]
    named = np.full(len(texts), -1, np.int64)
    for phrase in belong:
        holding = [block for block, text in enumerate(texts) if " ".join(phrase.split()) in text]
        if holding:
            named[max(holding, key=lambda block: len(texts[block]))] = 1
    for phrase in foreign:
        for block, text in enumerate(texts):
            if " ".join(phrase.split()) in text:
                named[block] = -1 if named[block] == 1 else 0
    sure = named >= 0
    targets = named if marked is None else np.where(sure, named, marked.targets)
    return MarkedPage(data, page, targets, 1.0 if marked is None else marked.weight, sure)


def with_open_captions(marked: MarkedPage) -> MarkedPage:
    """The page with every caption that was marked as main text left open: readers differ about them."""
    rows, _ = features(marked.data, marked.page)
    near = {name: rows[:, FEATURES.index(name)] for name in ("is_figcaption", "role_caption", "in_figure")}
    caption = (near["is_figcaption"] > 0) | (near["role_caption"] <= 1) | (near["in_figure"] <= 2)
    return marked._replace(targets=np.where(caption & (marked.targets == 1), -1, marked.targets))


def by_text(html: bytes, main: str, *, weight: float) -> MarkedPage:
    """A page marked by its main text, a paragraph a line: a block is main text where its letters are in it.

    A short block counts where it is a line of its own. Not decided are a block that holds a paragraph beside other text, and
    what such a text may leave out: a block that repeats the page's title, and cells of a table between two blocks of main
    text. Where less than 85 % of the text is found, nothing that is missing in it is decided.
    """
    data, page, texts = _blocks(html)
    rows, _ = features(data, page)
    lines, whole = {letters(line) for line in main.split("\n")}, letters(main)
    paragraphs = [line for line in lines if len(line) > 20]
    titles = (rows[:, _TITLE_SHARE] > 0.6) & np.array([3 < len(text.split()) < 30 for text in texts], np.bool_)
    owns = [letters(text) for text in texts]
    targets = np.zeros(len(texts), np.int64)
    for block, own in enumerate(owns):
        if own and (own in lines or (len(own) > 15 and own in whole)):
            targets[block] = 1
        elif not own or titles[block] or (len(own) > 60 and any(line in own for line in paragraphs)):
            targets[block] = -1
    found = np.flatnonzero(targets == 1)
    if sum(len(owns[block]) for block in found) < 0.85 * len(whole):
        targets[targets == 0] = -1
    elif len(found):
        between = slice(found[0], found[-1] + 1)
        targets[between][(targets[between] == 0) & (rows[between, _IS_CELL] > 0)] = -1
    return MarkedPage(data, page, targets, weight)


def _blocks(html: bytes) -> tuple[np.ndarray, Page, list[str]]:
    data = np.frombuffer(html, np.uint8)
    page = parse(data)
    return data, page, [block_text(data, page, block) for block in range(len(page.block_elements))]
