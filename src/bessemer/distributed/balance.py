"""Balanced assignment of layers to pipeline stages, which keeps waiting between stages short."""

from __future__ import annotations

import numpy as np

from bessemer.model.config import ModelConfig
from bessemer.model.costs import layer_parts, mtp_parts

# Shapes: L layers, S stages.


def balanced_stages(model: ModelConfig, stages: int) -> list[range]:
    """Consecutive layers of every stage, at least one: minimises the cost of the most expensive stage, then the sum of squared
    costs.

    The cost of a layer is the number of weights that a token is multiplied with. The head and multi-token prediction blocks
    count with the last layer.
    """
    assert 1 <= stages <= model.num_hidden_layers
    costs = [sum(part.multiplying for part in layer_parts(model, layer)) for layer in range(model.num_hidden_layers)]
    head = model.vocab_size * model.hidden_size
    costs[-1] += head
    if model.num_nextn_predict_layers:
        costs[-1] += model.num_nextn_predict_layers * (head + sum(part.multiplying for part in mtp_parts(model)))
    return _even_ranges(np.array(costs) / sum(costs), stages)


def _even_ranges(costs_L: np.ndarray, stages: int) -> list[range]:
    """Consecutive ranges with the least largest cost, then the least sum of squares; dynamic programming over the last
    range."""
    sums = np.concatenate(([0.0], np.cumsum(costs_L)))
    #: Cost of layers i … j - 1 at [i, j]; infinite for an empty range.
    between = np.where(np.tri(len(sums), dtype=bool), np.inf, sums - sums[:, None])
    largest = _least(between, stages, np.maximum)[0][stages, -1]
    squares = np.where(between <= largest * (1 + 1e-9), between**2, np.inf)
    starts = _least(squares, stages, np.add)[1]
    ranges, end = [], len(costs_L)
    for stage in range(stages, 0, -1):
        start = int(starts[stage, end])
        ranges.append(range(start, end))
        end = start
    return ranges[::-1]


def _least(price: np.ndarray, stages: int, together: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """Lowest cost of the first j layers in s ranges, at [s, j], and the start of the last range."""
    best = np.full((stages + 1, len(price)), np.inf)
    starts = np.zeros(best.shape, np.int64)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        tried = together(best[stage - 1][:, None], price)
        starts[stage], best[stage] = tried.argmin(0), tried.min(0)
    return best, starts
