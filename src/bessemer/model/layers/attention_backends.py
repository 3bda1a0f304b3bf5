"""Backends that compute softmax(q kᵀ · scale + mask) v. One defines the result; the others are faster or leaner."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bessemer.model.layers.attention_mask import AttentionMask, bias

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


# Shapes: B batch, T queries, S keys, H query heads.


# Shapes: B batch, H query heads, K key-value heads, G query heads of a group, T queries, S keys, C channels of a head,
# V channels of a value head.


class Scores(NamedTuple):
    """What is done to scores before the softmax.

    softcap: they become c·tanh(scores / c). sinks_H: a score of every head that takes part in the softmax's sum and has
    no value, so that a head may attend to nothing.
    """

    scale: float
    softcap: float | None = None
    sinks_H: Tensor | None = None


class AttentionBackend(Protocol):
    """(B, H, T, C) queries over (B, K, S, C) keys and (B, K, S, V) values: (B, H, T, V)."""

    def __call__(
        self, query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores
    ) -> Tensor: ...


def explicit(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """The definition, step by step, with all scores in memory. The others are tested against it."""
    value_BHSV = value_BKSV.repeat_interleave(query_BHTC.shape[1] // value_BKSV.shape[1], dim=1)
    return attention_weights(query_BHTC, key_BKSC, mask, scores).to(value_BHSV.dtype) @ value_BHSV


def attention_weights(query_BHTC: Tensor, key_BKSC: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """How much of each key's value a query takes, (B, H, T, S) float32, of float64 queries float64. Rows sum to 1, less what a
    sink takes."""
    key_BHSC = key_BKSC.repeat_interleave(query_BHTC.shape[1] // key_BKSC.shape[1], dim=1)
    scores_BHTS = capped(query_BHTC @ key_BHSC.transpose(-1, -2) * scores.scale, scores.softcap)
    bias_BHTS = mask.dense
    if bias_BHTS is None and scores_BHTS.shape[-2] > 1:
        queries, keys = (torch.arange(length, device=query_BHTC.device) for length in scores_BHTS.shape[-2:])
        bias_BHTS = bias(mask, queries, keys)
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    return _softmax(scores_BHTS, scores.sinks_H)


def _softmax(scores_BHTS: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Weights in float32, or in float64 where the scores are, a sink's share left out."""
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    if sinks_H is None:
        return scores_BHTS.softmax(-1, dtype=wide)
    sinks_BHT1 = sinks_H.view(1, -1, 1, 1).expand(*scores_BHTS.shape[:3], 1).to(scores_BHTS.dtype)
    return torch.cat((scores_BHTS, sinks_BHT1), dim=-1).softmax(-1, dtype=wide)[..., :-1]


def sdpa(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """PyTorch's fused kernels (flash attention where the device has it); what they cannot do is done explicitly."""
    if scores.softcap is not None or scores.sinks_H is not None:
        return explicit(query_BHTC, key_BKSC, value_BKSV, mask, scores)
    # compiled for rows of any length, the comparison would be a symbol, which the kernels do not take
    causal = True if mask.dense is None and query_BHTC.shape[2] > 1 else False  # noqa: SIM210
    return functional.scaled_dot_product_attention(
        query_BHTC,
        key_BKSC,
        value_BKSV,
        attn_mask=mask.dense,
        is_causal=causal,
        scale=scores.scale,
        enable_gqa=query_BHTC.shape[1] != key_BKSC.shape[1],
    )


#: Blocks of queries in a row of `blocked`, and the longest row that it computes itself.
_BLOCKS, _LONGEST = 4, 1024


def blocked(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """The definition for a few blocks of queries, each over the keys up to its end only; for training on a processor that
    multiplies in bfloat16, compiled, where it takes a third of `sdpa`'s time.

    The products are plain large ones, the rest is fused, and half of the masked scores are never made. What it
    keeps for the backward pass grows with the square of the length, so long rows, and all that needs no gradient, are
    `sdpa`'s. Scores are rounded to the type of the products, as in every unfused attention, sums are float32.
    """
    queries, keys = query_BHTC.shape[2], key_BKSC.shape[2]
    is_causal = mask.slots_BT is None and mask.seen_until_BT is None
    if not torch.is_grad_enabled() or queries > _LONGEST or queries != keys or not is_causal:
        return sdpa(query_BHTC, key_BKSC, value_BKSV, mask, scores)
    heads, kv_heads, dtype = query_BHTC.shape[1], key_BKSC.shape[1], value_BKSV.dtype
    query_BKGTC = query_BHTC.to(dtype).unflatten(1, (kv_heads, heads // kv_heads))
    key_BKCS = key_BKSC.to(dtype).transpose(-1, -2)
    places = torch.arange(queries, device=query_BHTC.device)
    blocks = []
    count = min(_BLOCKS, queries)
    for number in range(count):
        start, end = queries * number // count, queries * (number + 1) // count
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        if mask.dense is None:
            bias_BHTS = bias(mask, places[start:end], places[first:end])
        else:
            bias_BHTS = mask.dense[..., start:end, first:end]
        # rows of all heads of a group in one matrix: one product
        rows_BKRC = query_BKGTC[:, :, :, start:end].flatten(2, 3)
        scores_BKRS = capped((rows_BKRC @ key_BKCS[..., first:end]).float() * scores.scale, scores.softcap)
        scores_BHTS = scores_BKRS.unflatten(2, (-1, end - start)).flatten(1, 2) + bias_BHTS
        weights_BHTS = _softmax(scores_BHTS, scores.sinks_H).to(dtype)
        weights_BKRS = weights_BHTS.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        attended_BKRV = weights_BKRS @ value_BKSV[:, :, first:end]
        blocks.append(attended_BKRV.unflatten(2, (-1, end - start)).flatten(1, 2))
    return torch.cat(blocks, dim=2)


def tiled(
    query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores, tile: int = 512
) -> Tensor:
    """What flash attention does (Dao et al. 2022, algorithm 1), in plain PyTorch: scores exist one tile at a time, so
    memory grows with the length and not with its square; backward computes each row of tiles again.
    """
    rows = []
    for start in range(0, query_BHTC.shape[2], tile):
        row = slice(start, start + tile)
        if torch.is_grad_enabled():
            rows.append(checkpoint(_row_of_tiles, query_BHTC, key_BKSC, value_BKSV, mask, scores, row, use_reentrant=False))
        else:
            rows.append(_row_of_tiles(query_BHTC, key_BKSC, value_BKSV, mask, scores, row))
    return torch.cat(rows, dim=2)


def _row_of_tiles(
    query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores, row: slice
) -> Tensor:
    """Some queries over all keys, tile by tile.

    The softmax is online (Milakov and Gimelshein 2018): of the tiles so far it keeps each query's largest score m, the
    sum Σ exp(score - m) and Σ exp(score - m) v. A tile with a larger score shrinks both sums by exp(m_old - m_new).
    """
    heads = query_BHTC.shape[1]
    kv_heads, keys = key_BKSC.shape[1:3]
    wide = torch.promote_types(query_BHTC.dtype, torch.float32)
    query_BKGTC = query_BHTC[:, :, row].unflatten(1, (kv_heads, heads // kv_heads)).to(wide) * scores.scale
    queries_T = torch.arange(query_BHTC.shape[2], device=query_BHTC.device)[row]
    places = queries_T if mask.slots_BT is None else mask.slots_BT[:, queries_T]
    first, last = int(places.min()), int(places.max())
    if mask.seen_until_BT is not None:
        last = int(mask.seen_until_BT[:, queries_T].max())
    tile = row.stop - row.start

    shape = (*query_BKGTC.shape[:-1], 1)
    if scores.sinks_H is None:
        largest, total = query_BKGTC.new_full(shape, -torch.inf), query_BKGTC.new_zeros(shape)
    else:
        # a sink is a key without a value, seen before the others
        largest = scores.sinks_H.to(wide).view(1, kv_heads, -1, 1, 1).expand(shape)
        total = query_BKGTC.new_ones(shape)
    weighted = query_BKGTC.new_zeros((*shape[:-1], value_BKSV.shape[-1]))
    begin = 0 if mask.window is None else max(0, first - mask.window + 1)
    # masked tiles are passed over
    for start in range(begin, min(last + 1, keys), tile):
        keys_S = torch.arange(start, min(start + tile, keys), device=query_BHTC.device)
        key_BKSC_tile, value_BKSV_tile = (heads[:, :, keys_S, :].to(wide) for heads in (key_BKSC, value_BKSV))
        scores_BKGTS = capped(torch.einsum("bkgtc,bksc->bkgts", query_BKGTC, key_BKSC_tile), scores.softcap)
        bias_BHTS = bias(mask, queries_T, keys_S)
        per_group = (kv_heads, -1) if bias_BHTS.shape[1] > 1 else (1, 1)
        scores_BKGTS = scores_BKGTS + bias_BHTS.unflatten(1, per_group)
        new_largest = torch.maximum(largest, scores_BKGTS.amax(-1, keepdim=True))
        # nothing seen yet: exp(-inf - 0) is 0
        reference = new_largest.masked_fill(new_largest == -torch.inf, 0.0)
        weights_BKGTS = (scores_BKGTS - reference).exp()
        shrink = (largest - reference).exp()
        total = total * shrink + weights_BKGTS.sum(-1, keepdim=True)
        weighted = weighted * shrink + torch.einsum("bkgts,bksv->bkgtv", weights_BKGTS, value_BKSV_tile)
        largest = new_largest
    return (weighted / total).to(value_BKSV.dtype).flatten(1, 2)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores held within ±c by c·tanh(scores / c); unchanged without a cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def block_mask(mask: AttentionMask, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Which blocks of 128 queries and 128 keys have a score that counts, and which scores of them do; the same for all heads.

    Without blocks that are masked whole, attention over packed documents costs what their own lengths do.
    """

    def may_see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query if mask.slots_BT is None else mask.slots_BT[batch, query]
        distance = place - key
        allowed = distance >= 0
        if mask.seen_until_BT is not None:
            allowed = key <= mask.seen_until_BT[batch, query]
        if mask.window is not None:
            allowed = allowed & (distance < mask.window)
        if mask.documents_BT is not None:
            own, of_key = mask.documents_BT[batch, place], mask.documents_BT[batch, key]
            if mask.visible_to_BT is None:
                allowed = allowed & (own == of_key)
            else:
                allowed = allowed & (of_key <= own) & (own <= mask.visible_to_BT[batch, key])
        return allowed

    by_row = (mask.slots_BT, mask.documents_BT, mask.seen_until_BT)
    rows = next((len(each) for each in by_row if each is not None), None)
    with _kernels_compile():
        blocks: BlockMask = _block_mask_maker(device)(may_see, rows, None, queries, keys, device=str(device))
    return blocks


def _block_mask_maker(device: torch.device) -> Any:
    """`create_block_mask`, where kernels are compiled itself compiled: uncompiled it makes a number for each query and key."""
    from torch.nn.attention.flex_attention import create_block_mask

    return _compiled_block_mask() if _needs_kernel(device) else create_block_mask


@cache
def _compiled_block_mask(backend: str | Callable[..., Any] = "inductor") -> Any:
    """`create_block_mask` for any number of rows and any length, compiled for each kind of mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, backend=backend, dynamic=True)


def _kernels_compile() -> AbstractContextManager[Any]:
    """While entered, kernels of attention are compiled also where blocks are not, as in validation (`Runtime.evaluating`)."""
    return nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("default")


#: Kernels of FlexAttention that may be compiled: of each kind of layer one for many rows and one for a single row, with and
#: without a gradient.
_FLEX_KERNELS = 64


@cache
def _compiled_flex_attention(backend: str | Callable[..., Any] = "inductor") -> Any:
    """FlexAttention as a kernel; uncompiled it makes all scores.

    Numbers of rows and lengths are arguments of a kernel from the first one on, not constants: rollouts have other ones at
    every step. More kernels than there are kinds are an error, not a fall back to the uncompiled function.
    """
    from torch.nn.attention.flex_attention import flex_attention

    # PyTorch 2.13 takes a limit for one function, and its overloads do not say so
    return torch.compile(  # type: ignore[call-overload]
        flex_attention, backend=backend, dynamic=True, fullgraph=True, recompile_limit=_FLEX_KERNELS
    )


def _needs_kernel(device: torch.device) -> bool:
    """Whether `flex` compiles a kernel: not in a block that is compiled with its attention, and not on a CPU."""
    return device.type != "cpu" and not torch.compiler.is_compiling()


def _flex_kernel(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor) -> Any:
    """FlexAttention for these queries, keys and values."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _needs_kernel(query_BHTC.device):
        return flex_attention
    from torch._dynamo import mark_static

    for heads in (query_BHTC, key_BKSC, value_BKSV):
        # constants of a kernel: how many heads, and how wide they are
        mark_static(heads, [1, 3])
    return _compiled_flex_attention()


def flex(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """FlexAttention: one generated kernel for any of this, that passes over masked blocks.

    For GPUs, where it has a backward. A sink is brought in afterwards: with the log of the softmax's sum, ℓ, all weights
    shrink by σ(ℓ - sink).
    """
    from torch.nn.attention.flex_attention import AuxRequest

    def changed(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = capped(score, scores.softcap)
        if mask.slopes_H is not None:
            score = score - mask.slopes_H[head] * ((query if mask.slots_BT is None else mask.slots_BT[batch, query]) - key)
        return score

    blocks = mask.blocks
    if blocks is None:
        blocks = block_mask(mask, query_BHTC.shape[2], key_BKSC.shape[2], query_BHTC.device)
    # under autocast norms leave queries and keys in float32
    query_BHTC, key_BKSC = query_BHTC.to(value_BKSV.dtype), key_BKSC.to(value_BKSV.dtype)
    kernel = _flex_kernel(query_BHTC, key_BKSC, value_BKSV)
    with _kernels_compile() if _needs_kernel(query_BHTC.device) else nullcontext():
        out = kernel(
            query_BHTC,
            key_BKSC,
            value_BKSV,
            score_mod=None if scores.softcap is None and mask.slopes_H is None else changed,
            block_mask=blocks,
            scale=scores.scale,
            enable_gqa=query_BHTC.shape[1] != key_BKSC.shape[1],
            return_aux=None if scores.sinks_H is None else AuxRequest(lse=True),
        )
    if scores.sinks_H is None:
        attended_BHTV: Tensor = out
        return attended_BHTV
    attended_BHTV, aux = out
    return attended_BHTV * torch.sigmoid(aux.lse - scores.sinks_H[:, None]).to(attended_BHTV.dtype)[..., None]


BACKENDS: dict[str, AttentionBackend] = {
    "sdpa": sdpa,
    "explicit": explicit,
    "blocked": blocked,
    "tiled": tiled,
    "flex": flex,
}
#: Backends that read the dense mask; the others go by the fields it is made of.
DENSE_BACKENDS = frozenset({"sdpa", "explicit", "blocked"})
