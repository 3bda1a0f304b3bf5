"""Which layers go to which stage of a pipeline, so that no stage waits for another longer than it must."""

from __future__ import annotations

from bessemer.model.config import ModelConfig
from bessemer.model.costs import ahead_parts, layer_parts


def balanced_stages(model: ModelConfig, stages: int) -> list[range]:
    """Consecutive layers for every stage, so that the dearest is as cheap as can be. The head counts with the last layer, and
    so do the blocks that predict further ahead."""
    costs = [sum(part.multiplying for part in layer_parts(model, layer)) for layer in range(model.num_hidden_layers)]
    head = model.vocab_size * model.hidden_size
    costs[-1] += head
    if model.num_nextn_predict_layers:
        costs[-1] += model.num_nextn_predict_layers * (head + sum(part.multiplying for part in ahead_parts(model)))
    least, most = max(costs), sum(costs)
    while least < most:
        middle = (least + most) // 2
        if len(_packed(costs, middle)) <= stages:
            most = middle
        else:
            least = middle + 1
    starts = _packed(costs, least)
    while len(starts) < stages:  # cut the longest stages that are left
        ends = [*starts[1:], len(costs)]
        longest = max(range(len(starts)), key=lambda stage: ends[stage] - starts[stage])
        starts.insert(longest + 1, (starts[longest] + ends[longest] + 1) // 2)
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(costs)], strict=True)]


def _packed(costs: list[int], bound: int) -> list[int]:
    """First layers of the stages, each filled up from the front as far as the bound allows."""
    starts, filled = [0], 0
    for layer, cost in enumerate(costs):
        if filled + cost > bound:
            starts.append(layer)
            filled = 0
        filled += cost
    return starts
