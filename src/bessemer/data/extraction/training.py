"""Fitting the model of blocks on marked pages: gradient boosting of oblivious trees, deterministic and small enough to read.

Each tree is grown level by level. At every level the question (a feature and a threshold) is the one under which the sum of
G² / (H + λ) over all leaves is largest, where G and H are sums of the logistic loss's first and second derivatives
(Friedman 2001; the second-order form is Chen and Guestrin's, 2016; one question per level as in CatBoost,
Prokhorenkova et al. 2018).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bessemer.data.extraction.features import _CHARACTERS, features
from bessemer.data.extraction.model import Model, Trees, probabilities, second_rows
from bessemer.data.extraction.parsing import Page, parse
from bessemer.data.extraction.peers import letters
from bessemer.data.extraction.render import block_text
from bessemer.data.text.compiled import compiled_allocating

#: Thresholds tried for each feature: quantiles of its values.
_BINS = 64


class MarkedPage(NamedTuple):
    """A page with a target for each block, 1 main text, 0 not, -1 not decided, and how much the page counts."""

    data: np.ndarray
    page: Page
    targets: np.ndarray
    weight: float = 1.0


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
    allowed: np.ndarray,
    penalty: float,
) -> tuple[int, int]:
    """The feature and bin whose question gains most: those of the lowest number on a tie."""
    rows, columns = binned.shape
    best_gain = -1.0
    best_feature = best_bin = 0
    sums = np.zeros((leaf_count, _BINS + 1, 2))
    for feature in range(columns):
        if not allowed[feature] or bins[feature] == 0:
            continue
        sums[:] = 0.0
        for row in range(rows):
            sums[leaves[row], binned[row, feature], 0] += gradients[row]
            sums[leaves[row], binned[row, feature], 1] += hessians[row]
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
    seed: int = 0,
) -> Trees:
    """An ensemble for `targets`, (R,) of 0 and 1, given `rows`, (R, F). Each tree sees a random `sample` of the features."""
    random = np.random.default_rng(seed)
    edges = edges_of(rows)
    # a row goes right when its value is above the threshold, as in `probabilities`
    binned = np.stack([np.searchsorted(edge, column, side="left") for edge, column in zip(edges, rows.T, strict=True)], axis=1)
    binned = binned.astype(np.uint8)
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
        leaves = np.zeros(len(rows), np.int64)
        allowed = np.asarray(random.random(rows.shape[1]) < sample)
        for level in range(depth):
            feature, bin_ = _best_question(binned, leaves, gradients, hessians, 2**level, bins, allowed, penalty)
            asked[tree, level], thresholds[tree, level] = feature, edges[feature][bin_]
            leaves = 2 * leaves + (binned[:, feature] > bin_)
        up = np.bincount(leaves, gradients, 2**depth)
        down = np.bincount(leaves, hessians, 2**depth)
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


def fit(pages: list[MarkedPage], *, folds: int = 6, threshold: float = 0.5, seed: int = 0, **settings: float) -> Model:
    """Both ensembles. The second learns from answers of first ensembles that had not seen the page in question."""
    described = [features(page.data, page.page) for page in pages]
    rows = [row for row, _ in described]
    characters = [counts[:, _CHARACTERS] for _, counts in described]
    weights = [page.weight * weights_of(page.targets, size) for page, size in zip(pages, characters, strict=True)]
    group = np.random.default_rng(seed).permutation(len(pages)) % folds

    def fitted(chosen: list[int], inputs: list[np.ndarray], seed: int) -> Trees:
        known = [pages[n].targets >= 0 for n in chosen]
        return fit_trees(
            np.concatenate([inputs[n][k] for n, k in zip(chosen, known, strict=True)]),
            np.concatenate([pages[n].targets[k] for n, k in zip(chosen, known, strict=True)]).astype(float),
            np.concatenate([weights[n][k] for n, k in zip(chosen, known, strict=True)]),
            seed=seed,
            **settings,  # type: ignore[arg-type]
        )

    everything = list(range(len(pages)))
    seconds: list[np.ndarray] = [np.empty(0)] * len(pages)
    for fold in range(folds):
        first = fitted([n for n in everything if group[n] != fold], rows, seed)
        for n in everything:
            if group[n] == fold:
                seconds[n] = second_rows(probabilities(rows[n], first), rows[n], characters[n], pages[n].page)
    return Model(fitted(everything, rows, seed), fitted(everything, seconds, seed + 1), threshold)


def agreed(html: bytes, first: str, second: str, *, weight: float) -> MarkedPage | None:
    """A page that nobody marked, by two other extractors' texts of it: a block is main text where it is in both, not where it
    is in neither, and undecided where they differ. None where they differ too much for the page to teach anything.
    """
    data = np.frombuffer(html, np.uint8)
    page = parse(data)
    blocks = [letters(block_text(data, page, block)) for block in range(len(page.block_elements))]
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
    data = np.frombuffer(html, np.uint8)
    page = parse(data)
    texts = [block_text(data, page, block) for block in range(len(page.block_elements))]
    targets = np.array([1 if text in main else -1 if text in undecided else 0 for text in texts], np.int64)
    return MarkedPage(data, page, targets)
