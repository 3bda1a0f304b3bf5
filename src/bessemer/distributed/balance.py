"""Which layers go to which stage of a pipeline, so that no stage waits for another longer than it must."""

from __future__ import annotations

import numpy as np

from bessemer.model.config import ModelConfig
from bessemer.model.costs import layer_parts, mtp_parts

# Shapes: L layers, S stages.


def balanced_stages(model: ModelConfig, stages: int) -> list[range]:
    """Consecutive layers for every stage, at least one: the dearest stage is as cheap as can be, and of all ways to do that the
    one with the most even costs.

    A layer costs what a token is multiplied with there. The head counts with the last layer, and so do the blocks that predict
    further ahead.
    """
    assert 1 <= stages <= model.num_hidden_layers
    costs = [sum(part.multiplying for part in layer_parts(model, layer)) for layer in range(model.num_hidden_layers)]
    head = model.vocab_size * model.hidden_size
    costs[-1] += head
    if model.num_nextn_predict_layers:
        costs[-1] += model.num_nextn_predict_layers * (head + sum(part.multiplying for part in mtp_parts(model)))
    return _even_ranges(np.array(costs) / sum(costs), stages)


def _even_ranges(costs_L: np.ndarray, stages: int) -> list[range]:
    """Consecutive ranges of least largest cost, then of least sum of squares; by dynamic programming over the last range."""
    sums = np.concatenate(([0.0], np.cumsum(costs_L)))
    #: Of layers i … j - 1, at [i, j]; no range where there are none.
    between = np.where(np.tri(len(sums), dtype=bool), np.inf, sums - sums[:, None])
    largest = _least(between, stages, np.maximum)[0][stages, -1]
    squares = np.where(between <= largest * (1 + 1e-9), between**2, np.inf)
    starts = _least(squares, stages, np.add)[1]
    found, end = [], len(costs_L)
    for stage in range(stages, 0, -1):
        start = int(starts[stage, end])
        found.append(range(start, end))
        end = start
    return found[::-1]


def _least(price: np.ndarray, stages: int, together: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """What the first j layers cost at least in s ranges, at [s, j], and where the last of these begins."""
    best = np.full((stages + 1, len(price)), np.inf)
    starts = np.zeros(best.shape, np.int64)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        tried = together(best[stage - 1][:, None], price)
        starts[stage], best[stage] = tried.argmin(0), tried.min(0)
    return best, starts
