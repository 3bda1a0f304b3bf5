"""Rows whose tokens are sharded over ranks, and ring attention over them by fused kernels (Liu et al. 2023).

A rank's two chunks of a row meet two of each other rank's. Of a pair of chunks the keys are all before the queries, or the
same tokens, or all behind them: attention without a mask, with a causal one, or none. So each pair is one call of PyTorch's
flash attention, which gives the log of the softmax's sum too, and partial results are merged by it. The backward pass calls
the kernel's own with the result and the log of whole rows, which gives each pair's part of the gradients.

Shapes: B batch, T tokens that are here, H query heads, K key-value heads, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.distributed.layout import chunks_of_rank
from bessemer.model.layers.attention_backends import Scores
from bessemer.model.layers.attention_mask import AttentionMask

_ops = torch.ops.aten
#: Where fused kernels are used; those of a processor compute in tests.
_FUSED_DEVICES = ("cuda",)
#: The widest head of flash attention's kernels for a GPU, and what widths are multiples of.
_WIDEST_HEAD, _HEAD_STEP = 256, 8


@dataclass(frozen=True)
class RowShard:
    """The tokens of a row on a rank: `length` of them, half from the front and half from the back (`Layout.columns`)."""

    rank: int
    ranks: int
    length: int

    @property
    def each(self) -> int:
        """Tokens of each half."""
        return self.length // 2

    @property
    def starts(self) -> tuple[int, int]:
        """The positions of the halves' first tokens in the row."""
        front, back = chunks_of_rank(self.rank, self.ranks)
        return front * self.each, back * self.each

    def places(self, device: torch.device) -> Tensor:
        """The positions of all tokens in the row, (T,)."""
        return torch.cat([torch.arange(start, start + self.each, device=device) for start in self.starts])

    def tiles(self, size: int) -> Iterator[Tile]:
        """The tokens in tiles of at most `size` consecutive tokens of the row."""
        for half, first in enumerate(self.starts):
            for start in range(0, self.each, size):
                here = slice(half * self.each + start, half * self.each + min(start + size, self.each))
                yield Tile(here, first + start, here.stop - here.start)


class Tile(NamedTuple):
    """Consecutive tokens of a row: their slice on this rank, and the position of the first in the row."""

    here: slice
    first: int
    size: int

    @property
    def last(self) -> int:
        """The position of the last in the row."""
        return self.first + self.size - 1


def merged(output: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from each one's output (…, V) and log of the softmax's sum (…).

    A log of −∞ stands for no key, with output 0.
    """
    total = torch.logaddexp(log_sum, other_log_sum)
    reference = total.masked_fill(total == -torch.inf, 0.0)
    weight, other_weight = ((part - reference).exp()[..., None] for part in (log_sum, other_log_sum))
    return output * weight + other * other_weight, total


class Passing:
    """Asynchronous send of tensors to the next rank of a group, and receive of those of the previous rank."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._sent = tensors
        self._coming = [torch.empty_like(tensor) for tensor in tensors]
        to, of = (rank + 1) % ranks, (rank - 1) % ranks
        operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=to) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=of) for tensor in self._coming]
        self._works = dist.batch_isend_irecv(operations)

    def received(self) -> list[Tensor]:
        """The received tensors, after all sends and receives have completed."""
        for work in self._works:
            work.wait()
        return self._coming


def can_fuse(query_BHTC: Tensor, value_BKTC: Tensor, mask: AttentionMask, scores: Scores, ranks: int) -> bool:
    """Whether fused kernels compute attention over rows that are sharded: plain causal attention, on a GPU in 16 bits."""
    width = query_BHTC.shape[-1]
    if query_BHTC.device.type not in _FUSED_DEVICES or width != value_BKTC.shape[-1]:
        return False
    if query_BHTC.device.type == "cuda" and (query_BHTC.dtype.itemsize != 2 or width > _WIDEST_HEAD or width % _HEAD_STEP):
        return False
    sees_all = mask.window is None or mask.window >= query_BHTC.shape[2] * ranks
    is_plain = mask.documents_BT is None and mask.slopes_H is None and scores.softcap is None and scores.sinks_H is None
    return sees_all and is_plain


def fused_ring_attention(
    query_BHTC: Tensor, key_BKTC: Tensor, value_BKTC: Tensor, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of the queries here over the keys of all ranks of a group, (B, H, T, C); every rank of it calls this."""
    out: Tensor = _FusedRingAttention.apply(query_BHTC, key_BKTC, value_BKTC, scale, group)
    return out


class _Pair(NamedTuple):
    """Chunks of queries and keys that meet, and whether they are the same tokens."""

    queries: slice
    keys: slice
    is_causal: bool


def _pairs(length: int, step: int, group: dist.ProcessGroup) -> Iterator[_Pair]:
    """The pairs of chunks that meet after the keys have been passed `step` times, where any key is visible."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine, theirs = RowShard(rank, ranks, length), RowShard((rank - step) % ranks, ranks, length)
    for queries in mine.tiles(mine.each):
        for keys in theirs.tiles(theirs.each):
            if keys.first <= queries.first:
                yield _Pair(queries.here, keys.here, keys.first == queries.first)


def _forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """Of a pair: the result, the log of the softmax's sum (B, H, T), and what the backward kernel of a GPU wants besides."""
    if query.device.type == "cpu":
        out, log_sum = _ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
        return out, log_sum, ()
    out, log_sum, ends_of_queries, ends_of_keys, _, _, seed, offset, _ = _ops._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return out, log_sum, (ends_of_queries, ends_of_keys, seed, offset)


def _backward(
    gradient: Tensor, pair: Sequence[Tensor], out: Tensor, log_sum: Tensor, kept: Sequence[Any], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a pair (queries, keys, values): its part of their gradients. out and log_sum: of the queries over all keys."""
    query, key, value = pair
    if query.device.type == "cpu":
        found = _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, out, log_sum, 0.0, is_causal, scale=scale
        )
    else:
        ends_of_queries, ends_of_keys, seed, offset = kept
        found = _ops._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, out, log_sum, ends_of_queries, ends_of_keys, query.shape[2], key.shape[2], 0.0,
            is_causal, seed, offset, scale=scale,
        )  # fmt: skip
    query_gradient, key_gradient, value_gradient = found
    return query_gradient, key_gradient, value_gradient


class _FusedRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query_BHTC: Tensor, key_BKTC: Tensor, value_BKTC: Tensor, scale: float, group: dist.ProcessGroup
    ) -> Tensor:
        each = query_BHTC.shape[1] // key_BKTC.shape[1]
        wide = torch.promote_types(query_BHTC.dtype, torch.float32)
        out_BHTC = torch.zeros_like(query_BHTC, dtype=wide)
        log_sum_BHT = out_BHTC.new_full(out_BHTC.shape[:-1], -torch.inf)
        block, kept = (key_BKTC.contiguous(), value_BKTC.contiguous()), ()
        ranks = dist.get_world_size(group)
        for step in range(ranks):
            coming = Passing(block, group) if step < ranks - 1 else None
            for queries, keys, is_causal in _pairs(query_BHTC.shape[2], step, group):
                key, value = (part[:, :, keys].repeat_interleave(each, 1) for part in block)
                partial, partial_log_sum, kept = _forward(query_BHTC[:, :, queries].contiguous(), key, value, is_causal, scale)
                so_far, so_far_log_sum = out_BHTC[:, :, queries], log_sum_BHT[..., queries]
                out, log_sum = merged(so_far, so_far_log_sum, partial.to(wide), partial_log_sum.to(wide))
                so_far.copy_(out)
                so_far_log_sum.copy_(log_sum)
            if coming is not None:
                block = tuple(coming.received())
        out_BHTC = out_BHTC.to(query_BHTC.dtype)
        context.save_for_backward(query_BHTC, key_BKTC, value_BKTC, out_BHTC, log_sum_BHT)
        context.scale, context.group, context.kept = scale, group, kept
        return out_BHTC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient_BHTC: Tensor) -> tuple[Tensor | None, ...]:
        query_BHTC, key_BKTC, value_BKTC, out_BHTC, log_sum_BHT = context.saved_tensors
        group, key_heads = context.group, key_BKTC.shape[1]
        each = query_BHTC.shape[1] // key_heads
        wide = torch.promote_types(query_BHTC.dtype, torch.float32)
        query_gradient = torch.zeros_like(query_BHTC, dtype=wide)
        block: Sequence[Tensor] = (key_BKTC.contiguous(), value_BKTC.contiguous())
        travelling: Passing | None = None
        ranks = dist.get_world_size(group)
        for step in range(ranks):
            coming = Passing(block, group) if step < ranks - 1 else None
            gradients = [torch.zeros_like(part, dtype=wide) for part in block]
            for queries, keys, is_causal in _pairs(query_BHTC.shape[2], step, group):
                here = [part[:, :, queries].contiguous() for part in (gradient_BHTC, query_BHTC, out_BHTC)]
                key, value = (part[:, :, keys].repeat_interleave(each, 1) for part in block)
                log_sum = log_sum_BHT[..., queries].contiguous()
                pair = (here[1], key, value)
                of_query, *others = _backward(here[0], pair, here[2], log_sum, context.kept, is_causal, context.scale)
                query_gradient[:, :, queries] += of_query
                for gradient, other in zip(gradients, others, strict=True):
                    # of the query heads of a group, whose keys are the same
                    gradient[:, :, keys] += other.to(wide).unflatten(1, (key_heads, each)).sum(2)
            if travelling is not None:
                gradients = [own + so_far for own, so_far in zip(gradients, travelling.received(), strict=True)]
            travelling = Passing(gradients, group)
            if coming is not None:
                block = coming.received()
        assert travelling is not None
        key_gradient, value_gradient = travelling.received()
        dtype = query_BHTC.dtype
        return query_gradient.to(dtype), key_gradient.to(dtype), value_gradient.to(dtype), None, None
