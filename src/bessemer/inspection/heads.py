"""Attention heads: their roles, the loss without each, and one head at one position step by step.

Roles are attention to the token before, to the same token, to its last successor (induction), and to the first token. The steps
lead from query and keys to the weighted sum of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.errors import RequestError
from bessemer.inspection.recording import HeadsRecord, Recording, as_array, read, recording
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention_mask import bias

# Shapes: B batch, T time, L layers, H query heads.

ROLES = ("previous_token", "same_token", "induction", "first_token")


def role_scores(weights_HTT: np.ndarray, tokens_T: np.ndarray) -> dict[str, np.ndarray]:
    """Each head's score in each role on one text: the mean attention, (H,), 0 … 1, of its queries to

    - previous_token: the token before;
    - same_token: earlier occurrences of the query's own token;
    - induction: the tokens after those (Elhage et al. 2021; Olsson et al. 2022), by which a sequence is continued as before;
    - first_token: the first token, where attention rests that has nothing to look for (Xiao et al. 2023).

    Queries for which there is no such key are left out; NaN where there is no query at all.
    """
    tokens_T = np.asarray(tokens_T)
    rows, columns = np.indices((len(tokens_T), len(tokens_T)))
    same_TT = (tokens_T[:, None] == tokens_T) & (columns < rows)
    looked_for = {
        "previous_token": columns == rows - 1,
        "same_token": same_TT,
        # the key after an earlier occurrence; the query itself is not one
        "induction": np.pad(same_TT, ((0, 0), (1, 0)))[:, :-1] & (columns < rows),
        "first_token": (columns == 0) & (rows > 0),
    }
    return {role: _mean_attention(weights_HTT, looked_for[role]) for role in ROLES}


def _mean_attention(weights_HTT: np.ndarray, keys_TT: np.ndarray) -> np.ndarray:
    queries_T = keys_TT.any(-1)
    if not queries_T.any():
        return np.full(len(weights_HTT), np.nan)
    return (weights_HTT * keys_TT).sum(-1)[:, queries_T].mean(-1)


def recorded_roles(recorded: Recording, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The roles of every head on a recorded batch, each (L, H), the mean over its texts; NaN in layers without weights."""
    layers = len(recorded.residual) - 1
    heads = max((record.weights_BHTT.shape[1] for record in recorded.heads.values()), default=0)
    scores = {role: np.full((layers, heads), np.nan) for role in ROLES}
    for layer, record in recorded.heads.items():
        of_texts = [role_scores(*text) for text in zip(record.weights_BHTT, tokens_BT, strict=True)]
        for role in ROLES:
            scores[role][layer] = np.mean([of_text[role] for of_text in of_texts], axis=0)
    return scores


def head_roles(model: Decoder, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The roles of every head on a batch of texts, each (L, H); NaN in layers of linear attention."""
    tokens_BT = np.atleast_2d(tokens_BT)
    with recording(model) as recorded:
        read(model, tokens_BT)
    return recorded_roles(recorded, tokens_BT)


def repeated_tokens(
    ids: Sequence[int], *, begin: Sequence[int] = (), texts: int = 4, length: int = 25, seed: int = 0
) -> np.ndarray:
    """Texts of random tokens, (B, T), whose second half repeats the first: nothing else predicts it.

    ids: to draw from, without repetition; length: of one half, or as many as there are ids. begin: stands before each.
    """
    generator = np.random.default_rng(seed)
    halves = [generator.choice(np.asarray(ids), min(length, len(ids)), replace=False) for _ in range(texts)]
    return np.stack([np.concatenate((np.asarray(begin, np.int64), half, half)) for half in halves])


def strongest(scores_LH: np.ndarray, count: int = 5) -> list[tuple[int, int, float]]:
    """The heads with the highest scores: layer, head, score. NaN is passed over."""
    order = np.argsort(np.where(np.isnan(scores_LH), -np.inf, scores_LH), axis=None, kind="stable")[::-1]
    places = [divmod(int(place), scores_LH.shape[1]) for place in order[:count]]
    return [(layer, head, float(scores_LH[layer, head])) for layer, head in places if not np.isnan(scores_LH[layer, head])]


# Shapes: B batch, T time, L layers, H heads, V channels of a value head.
_TOKENS_AT_ONCE = 4096


@contextmanager
def without_heads(model: Decoder, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Inside the `with`, the heads (layer, head) add nothing: their input to the output projection is 0.

    Heads of linear attention are its value heads. Raises RequestError for a head that is not there.
    """
    with _silenced(model, [heads]):
        yield


def head_losses(
    model: Decoder, tokens_T: np.ndarray, on_layer: Callable[[int, int], None] | None = None
) -> tuple[float, np.ndarray]:
    """The model's mean loss on a text, and by how much it rises without each head, (L, H), nats per token.

    One head at a time; NaN where a layer has fewer heads than others. The heads of a layer are rows of one batch, which is
    expanded from one row at that layer. on_layer: called before each layer with its number and how many there are.
    """
    tokens_T = np.asarray(tokens_T)
    counts = [block.attention.output[1] for block in model.blocks]
    at_once = max(_TOKENS_AT_ONCE // len(tokens_T), 1)
    whole = _losses(model, tokens_T)[0]
    changes_LH = np.full((len(counts), max(counts)), np.nan)
    for layer, (block, count) in enumerate(zip(model.blocks, counts, strict=True)):
        if on_layer is not None:
            on_layer(layer, len(counts))
        for first in range(0, count, at_once):
            heads = range(first, min(first + at_once, count))
            part = block.register_forward_pre_hook(partial(_repeat_row, len(heads)))
            try:
                with _silenced(model, [[(layer, head)] for head in heads]):
                    changes_LH[layer, list(heads)] = np.array(_losses(model, tokens_T)) - whole
            finally:
                part.remove()
    return whole, changes_LH


def _losses(model: Decoder, tokens_T: np.ndarray) -> list[float]:
    """The mean loss on a text, for each row that it is read in."""
    hidden_BTD = read(model, tokens_T)
    following_T = torch.as_tensor(np.asarray(tokens_T[1:], np.int64), device=hidden_BTD.device)
    # row by row: the logits of all rows would need the most memory
    with torch.no_grad():
        return [float(functional.cross_entropy(model.logits(row[:-1]).float(), following_T)) for row in hidden_BTD]


def _repeat_row(count: int, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a block: `count` equal rows of its one row."""
    return given[0].expand(count, -1, -1), *given[1:]


@contextmanager
def _silenced(model: Decoder, without: Sequence[Sequence[tuple[int, int]]]) -> Iterator[None]:
    """Row b of a batch is read without the b-th set of heads; a single set holds for every row."""
    for layer in {layer for heads in without for layer, _ in heads} - set(range(len(model.blocks))):
        raise RequestError(f"there is no layer {layer}: the model has {len(model.blocks)}, counted from 0")
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            places = [(row, head) for row, heads in enumerate(without) for of_layer, head in heads if of_layer == layer]
            if not places:
                continue
            projection, count = block.attention.output
            kept_B1H1 = torch.ones(len(without), 1, count, 1)
            for row, head in places:
                if not 0 <= head < count:
                    raise RequestError(f"there is no head {head}: layer {layer} has {count}, counted from 0")
                kept_B1H1[row, 0, head] = 0
            stack.callback(projection.register_forward_pre_hook(partial(_multiply_heads, kept_B1H1)).remove)
        yield


def _multiply_heads(kept_B1H1: Tensor, projection: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """Before an output projection: each head times 1 or 0."""
    heads_BTHV = given[0].unflatten(-1, (kept_B1H1.shape[2], -1))
    return ((heads_BTHV * kept_B1H1.to(heads_BTHV)).flatten(2),)


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
    """The steps of one head, computed again from the queries, keys and values of a recording.

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
    """The mask of one query's scores: 0, ALiBi's penalty, or -inf."""
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
