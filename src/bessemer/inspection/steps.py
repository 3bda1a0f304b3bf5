"""One head at one position, step by step: from query and keys to the weighted sum of values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bessemer.core.errors import RequestError
from bessemer.inspection.recording import HeadsRecord, Recording, as_array
from bessemer.model.attention_mask import bias

# Shapes: T keys, C channels of a head, V channels of a value head.


@dataclass(frozen=True)
class OpenedHead:
    """How one head attends from one position; every step follows from the ones before it.

    products_T = keys · query; scaled_T = products · scale; capped_T = c·tanh(scaled / c), the same as scaled_T without a cap;
    masked_T = capped + mask, -inf where a key may not be seen; weights_T = softmax(masked), in whose sum a sink takes part
    with its score and takes sink_share; output_V = Σ weight · value.
    """

    layer: int
    head: int
    position: int
    scale: float
    softcap: float | None
    sink: float | None
    query_C: np.ndarray
    keys_TC: np.ndarray
    values_TV: np.ndarray
    products_T: np.ndarray
    scaled_T: np.ndarray
    capped_T: np.ndarray
    masked_T: np.ndarray
    weights_T: np.ndarray
    sink_share: float
    output_V: np.ndarray


def open_head(recording: Recording, layer: int, head: int, position: int, row: int = 0) -> OpenedHead:
    """The steps of one head from the queries, keys and values of a recording, computed again in the open.

    position: of the query; -1 is the last. Raises RequestError for a layer, head or position that is not there.
    """
    heads = heads_of(recording, layer)
    _, count, length, _ = heads.query_BHTC.shape
    if not 0 <= head < count:
        raise RequestError(f"there is no head {head}: layer {layer} has {count}, counted from 0")
    if not -length <= position < length:
        raise RequestError(f"there is no position {position}: the text has {length} tokens, counted from 0")
    position %= length
    group = count // heads.key_BKTC.shape[1]
    query_C = heads.query_BHTC[row, head, position]
    keys_TC, values_TV = heads.key_BKTC[row, head // group], heads.value_BKTV[row, head // group]
    scale, softcap, sinks_H = heads.scores
    products_T = keys_TC @ query_C
    scaled_T = products_T * np.float32(scale)
    capped_T = scaled_T if softcap is None else np.float32(softcap) * np.tanh(scaled_T / np.float32(softcap))
    masked_T = capped_T + _mask(heads, row, head, position)
    sink = None if sinks_H is None else float(sinks_H[head].detach())
    weights_T, sink_share = _softmax(masked_T, sink)
    return OpenedHead(
        layer, head, position, scale, softcap, sink, query_C, keys_TC, values_TV, products_T, scaled_T, capped_T, masked_T,
        weights_T, sink_share, weights_T @ values_TV,
    )  # fmt: skip


def heads_of(recording: Recording, layer: int) -> HeadsRecord:
    """One layer's heads. Raises RequestError when there is no such layer, or it has no attention weights."""
    layers = len(recording.residual) - 1
    if not 0 <= layer < layers:
        raise RequestError(f"there is no layer {layer}: the model has {layers}, counted from 0")
    if layer not in recording.heads:
        weighed = ", ".join(map(str, recording.heads)) or "none"
        raise RequestError(f"layer {layer} is linear attention, a state without attention weights; layers with: {weighed}")
    return recording.heads[layer]


def _mask(heads: HeadsRecord, row: int, head: int, position: int) -> np.ndarray:
    """What is added to one query's scores: 0, ALiBi's penalty, or -inf."""
    length = heads.key_BKTC.shape[2]
    device = None if heads.mask.slopes_H is None else heads.mask.slopes_H.device
    bias_BHTS = bias(heads.mask, torch.tensor([position], device=device), torch.arange(length, device=device))
    return as_array(bias_BHTS[row % len(bias_BHTS), head % bias_BHTS.shape[1], 0])


def _softmax(scores_T: np.ndarray, sink: float | None) -> tuple[np.ndarray, float]:
    """Weights of the keys, and of the sink where there is one."""
    largest = max(float(scores_T.max()), -np.inf if sink is None else sink)
    powers_T = np.exp(scores_T - np.float32(largest))
    of_sink = 0.0 if sink is None else float(np.exp(sink - largest))
    total = float(powers_T.sum()) + of_sink
    return powers_T / np.float32(total), of_sink / total
