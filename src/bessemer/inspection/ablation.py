"""Head ablation: the loss without a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.errors import RequestError
from bessemer.inspection.recording import read
from bessemer.model.decoder import Block, Decoder
from bessemer.model.latent_attention import LatentAttention

# Shapes: B batch, T time, L layers, H heads, V channels of a value head.
_TOKENS_AT_ONCE = 4096


@contextmanager
def without_heads(model: Decoder, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Inside the `with`, the heads (layer, head) add nothing: their input to the output projection is 0.

    Heads of linear attention are its value heads. Raises RequestError for a head that is not there.
    """
    with _silenced(model, [heads]):
        yield


def head_losses(model: Decoder, tokens_T: np.ndarray) -> tuple[float, np.ndarray]:
    """The model's mean loss on a text, and by how much it rises without each head, (L, H), nats per token.

    One head at a time; NaN where a layer has fewer heads than others. The heads of a layer are rows of one batch, which
    part where that layer begins.
    """
    tokens_T = np.asarray(tokens_T)
    counts = [_output(block)[1] for block in model.blocks]
    at_once = max(_TOKENS_AT_ONCE // len(tokens_T), 1)
    whole = _losses(model, tokens_T)[0]
    changes_LH = np.full((len(counts), max(counts)), np.nan)
    for layer, (block, count) in enumerate(zip(model.blocks, counts, strict=True)):
        for first in range(0, count, at_once):
            heads = range(first, min(first + at_once, count))
            part = block.register_forward_pre_hook(_rows(len(heads)))
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
    # row by row: the logits of all would be the largest thing in memory
    with torch.no_grad():
        return [float(functional.cross_entropy(model.logits(row[:-1]).float(), following_T)) for row in hidden_BTD]


def _rows(count: int) -> Any:
    """A hook that makes as many equal rows of the one that a block is given."""

    def repeat(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given[0].expand(count, -1, -1), *given[1:]

    return repeat


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
            projection, count = _output(block)
            kept_B1H1 = torch.ones(len(without), 1, count, 1)
            for row, head in places:
                if not 0 <= head < count:
                    raise RequestError(f"there is no head {head}: layer {layer} has {count}, counted from 0")
                kept_B1H1[row, 0, head] = 0
            stack.callback(projection.register_forward_pre_hook(_multiply(kept_B1H1)).remove)
        yield


def _multiply(kept_B1H1: Tensor) -> Any:
    def multiply(projection: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        heads_BTHV = given[0].unflatten(-1, (kept_B1H1.shape[2], -1))
        return ((heads_BTHV * kept_B1H1.to(heads_BTHV)).flatten(2),)

    return multiply


def _output(block: Block) -> tuple[nn.Linear, int]:
    """The output projection of a block's heads, and how many heads there are."""
    if block.is_linear:
        return block.linear_attn.out_proj, block.linear_attn.value_heads
    attention = block.self_attn
    if isinstance(attention, LatentAttention):
        return attention.o_proj, attention.heads
    return attention.o_proj, attention.o_proj.in_features // attention.head_dim
