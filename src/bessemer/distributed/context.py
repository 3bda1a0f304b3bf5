"""Context parallelism by ring attention (Liu et al. 2023): the tokens of every row are sharded over an axis.

Only attention and its mask change: everything else in a decoder works on each token by itself. A rank has two chunks of a
row, one from the front and one from the back (`Layout.columns`), so that causal attention is balanced. It keeps its queries,
and keys and values are passed from rank to rank; a query's partial results are merged by their log-sum-exp. The backward pass
goes round again, and the gradients of keys and values travel with them. A rank holds the keys of two ranks at a time.

Shapes: B batch, T tokens or queries that are here, S tokens of whole rows or keys of a tile, H query heads, K key-value
heads, G query heads of a group, C channels, V channels of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from bessemer.distributed.collectives import all_gather, to_autocast_dtype
from bessemer.distributed.fused_ring import Passing, RowShard, Tile, can_fuse, fused_ring_attention, merged
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention import AttentionLayer
from bessemer.model.layers.attention_backends import AttentionBackend, Scores, blocked, capped, sdpa
from bessemer.model.layers.attention_mask import AttentionMask, attention_mask, bias

#: Queries and keys of a tile; the scores of a tile are in memory at once.
_TILE = 512


def ring_attention(
    query_BHTC: Tensor, key_BKTC: Tensor, value_BKTV: Tensor, mask: AttentionMask, scores: Scores, group: dist.ProcessGroup
) -> Tensor:
    """Attention of the queries here over the keys of all ranks of a group, (B, H, T, V); every rank of it calls this.

    mask: of these queries over whole rows, without a dense tensor.
    """
    assert mask.dense is None
    out: Tensor = _RingAttention.apply(query_BHTC, key_BKTC, value_BKTV, scores.sinks_H, mask, scores, group)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        query_BHTC: Tensor,
        key_BKTC: Tensor,
        value_BKTV: Tensor,
        sinks_H: Tensor | None,
        mask: AttentionMask,
        scores: Scores,
        group: dist.ProcessGroup,
    ) -> Tensor:
        work = _LocalQueries(query_BHTC, key_BKTC.shape[1], mask, scores, group)
        out_BKGTV = work.query_BKGTC.new_zeros(*work.query_BKGTC.shape[:-1], value_BKTV.shape[-1])
        log_sum_BKGT = work.query_BKGTC.new_full(work.query_BKGTC.shape[:-1], -torch.inf)
        if sinks_H is not None:
            # the sink, a key without a value, is merged first
            log_sum_BKGT.copy_(work.by_head(sinks_H))
        block: Sequence[Tensor] = (key_BKTC.contiguous(), value_BKTV.contiguous())
        for step in range(work.ranks):
            coming = Passing(block, group) if step < work.ranks - 1 else None
            for queries, keys in work.pairs(step):
                scores_BKGTS, _ = work.scores(queries, keys, block[0])
                partial_log_sum = scores_BKGTS.logsumexp(-1)
                weights = (scores_BKGTS - partial_log_sum.masked_fill(partial_log_sum == -torch.inf, 0.0)[..., None]).exp()
                value_BKSV = block[1][:, :, keys.here].to(work.dtype)
                partial = torch.einsum("bkgts,bksv->bkgtv", weights, value_BKSV)
                so_far, so_far_log_sum = out_BKGTV[..., queries.here, :], log_sum_BKGT[..., queries.here]
                out, log_sum = merged(so_far, so_far_log_sum, partial, partial_log_sum)
                so_far.copy_(out)
                so_far_log_sum.copy_(log_sum)
            if coming is not None:
                block = coming.received()
        context.save_for_backward(query_BHTC, key_BKTC, value_BKTV, sinks_H, out_BKGTV, log_sum_BKGT)
        context.mask, context.scores, context.group = mask, scores, group
        return out_BKGTV.flatten(1, 2).to(value_BKTV.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient_BHTV: Tensor) -> tuple[Tensor | None, ...]:
        query_BHTC, key_BKTC, value_BKTV, sinks_H, out_BKGTV, log_sum_BKGT = context.saved_tensors
        scores, group = context.scores, context.group
        work = _LocalQueries(query_BHTC, key_BKTC.shape[1], context.mask, scores, group)
        gradient_BKGTV = work.grouped(gradient_BHTV)
        # the softmax's normaliser contributes this to the gradient of every score
        common_BKGT = (gradient_BKGTV * out_BKGTV).sum(-1)
        query_gradient = torch.zeros_like(work.query_BKGTC)
        block: Sequence[Tensor] = (key_BKTC.contiguous(), value_BKTV.contiguous())
        travelling: Passing | None = None
        for step in range(work.ranks):
            coming = Passing(block, group) if step < work.ranks - 1 else None
            key_gradient, value_gradient = (torch.zeros_like(tensor, dtype=work.dtype) for tensor in block)
            for queries, keys in work.pairs(step):
                scores_BKGTS, slope = work.scores(queries, keys, block[0])
                weights = (scores_BKGTS - log_sum_BKGT[..., queries.here, None]).exp()
                gradient = gradient_BKGTV[..., queries.here, :]
                value_BKSV, key_BKSC = (block[place][:, :, keys.here].to(work.dtype) for place in (1, 0))
                value_gradient[:, :, keys.here] += torch.einsum("bkgts,bkgtv->bksv", weights, gradient)
                inner = torch.einsum("bkgtv,bksv->bkgts", gradient, value_BKSV) - common_BKGT[..., queries.here, None]
                inner = inner * weights if slope is None else inner * weights * slope
                query_gradient[..., queries.here, :] += torch.einsum("bkgts,bksc->bkgtc", inner, key_BKSC)
                key_gradient[:, :, keys.here] += torch.einsum(
                    "bkgts,bkgtc->bksc", inner, work.query_BKGTC[..., queries.here, :]
                )
            if travelling is not None:
                so_far = travelling.received()
                key_gradient, value_gradient = key_gradient + so_far[0], value_gradient + so_far[1]
            travelling = Passing((key_gradient, value_gradient), group)
            if coming is not None:
                block = coming.received()
        assert travelling is not None
        key_gradient, value_gradient = travelling.received()
        sinks_gradient = None
        if sinks_H is not None:
            taken_BKGT = (work.by_head(sinks_H) - log_sum_BKGT).exp()
            sinks_gradient = -(taken_BKGT * common_BKGT).sum((0, 3)).flatten().to(sinks_H.dtype)
        query_gradient = (query_gradient * scores.scale).flatten(1, 2).to(query_BHTC.dtype)
        return query_gradient, key_gradient.to(key_BKTC.dtype), value_gradient.to(value_BKTV.dtype), sinks_gradient, *[None] * 3


class _LocalQueries:
    """This rank's queries, and their scores with the keys of other ranks."""

    def __init__(
        self, query_BHTC: Tensor, key_heads: int, mask: AttentionMask, scores: Scores, group: dist.ProcessGroup
    ) -> None:
        self.dtype = torch.promote_types(query_BHTC.dtype, torch.float32)
        self._key_heads = key_heads
        self._mask = mask
        self._softcap = scores.softcap
        self.query_BKGTC = self.grouped(query_BHTC) * scores.scale
        self.ranks = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._length = query_BHTC.shape[2]

    def grouped(self, heads_BHTC: Tensor) -> Tensor:
        """Heads grouped by their key-value head, in the dtype of sums."""
        return heads_BHTC.unflatten(1, (self._key_heads, -1)).to(self.dtype)

    def by_head(self, values_H: Tensor) -> Tensor:
        """A value of every head, broadcastable to (B, K, G, T)."""
        return values_H.to(self.dtype).view(1, self._key_heads, -1, 1)

    def pairs(self, step: int) -> Iterator[tuple[Tile, Tile]]:
        """Pairs of tiles of the queries and of the keys that are here after `step` steps, where any key is visible."""
        mine = RowShard(self._rank, self.ranks, self._length)
        theirs = RowShard((self._rank - step) % self.ranks, self.ranks, self._length)
        window = self._mask.window
        for queries in mine.tiles(_TILE):
            for keys in theirs.tiles(_TILE):
                if keys.first <= queries.last and (window is None or queries.first - keys.last < window):
                    yield queries, keys

    def scores(self, queries: Tile, keys: Tile, key_BKTC: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores of a pair of tiles, (B, K, G, T, S), and the slope of the cap where there is one."""
        key_BKSC = key_BKTC[:, :, keys.here].to(self.dtype)
        products = torch.einsum("bkgtc,bksc->bkgts", self.query_BKGTC[..., queries.here, :], key_BKSC)
        slope = None
        if self._softcap is not None:
            products = capped(products, self._softcap)
            slope = 1 - (products / self._softcap).square()
        mask = self._mask
        within = mask.window is None or queries.last - keys.first < mask.window
        if keys.last <= queries.first and within and mask.documents_BT is None and mask.slopes_H is None:
            return products, slope
        device = products.device
        queries_T = torch.arange(queries.here.start, queries.here.stop, device=device)
        bias_BHTS = bias(mask, queries_T, torch.arange(keys.first, keys.last + 1, device=device))
        return products + bias_BHTS.unflatten(1, (self._key_heads, -1) if bias_BHTS.shape[1] > 1 else (1, 1)), slope


def apply_context_parallel(model: nn.Module, mesh: Mesh, method: Literal["all_gather", "ring"]) -> None:
    """Make a model, or a stage of it, compute on this rank's part of every row; the other parts are on the context axis."""
    rows = ContextParallelRows(mesh.context, masks=method == "all_gather")
    for module in model.modules():
        if isinstance(module, Decoder):
            module.rows = rows
        elif isinstance(module, AttentionLayer) and module.backend is not None:
            # blocked attention needs whole rows
            inner = sdpa if module.backend is blocked else module.backend
            module.backend = rows.ring if method == "ring" else partial(rows.gathered, inner)


class ContextParallelRows:
    """Rows whose tokens are sharded over the ranks of an axis; implements the model's protocol `Rows`.

    masks: whether attention may need them; without, ring attention masks tile by tile.
    """

    def __init__(self, axis: DeviceMesh, *, masks: bool = True) -> None:
        self.axis = axis
        self.group = axis.get_group()
        self.ranks = axis.size()
        self.rank = axis.get_local_rank()
        self._masks = masks

    def local_rows(self, length: int) -> RowShard:
        """The positions in a row of this rank's `length` tokens."""
        return RowShard(self.rank, self.ranks, length)

    def attention_mask(
        self,
        queries: int,
        keys: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        visible_to_BT: Tensor | None = None,
        window: int | None = None,
        slopes_H: Tensor | None = None,
        aligned: bool = True,
        dense: bool = True,
    ) -> AttentionMask:
        """The mask of this rank's queries over the keys of whole rows. Plain causal attention has none."""
        assert slots_BT is None and queries == keys, "rows that are shared are not cached"
        assert visible_to_BT is None, "documents of rows that are shared share nothing"
        whole = queries * self.ranks
        plain = documents_BT is None and slopes_H is None and (window is None or window >= whole)
        if documents_BT is not None:
            documents_BT = in_order(all_gather(documents_BT, self.axis, 0, gradient="partial"), self.ranks, dim=1)
        return attention_mask(
            queries,
            whole,
            dtype,
            device,
            slots_BT=self.local_rows(queries).places(device)[None],
            documents_BT=documents_BT,
            window=window,
            slopes_H=slopes_H,
            aligned=False,
            dense=dense and self._masks and not plain,
        )

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the ranks of the group."""
        counts = counts.contiguous().clone()
        dist.all_reduce(counts, group=self.group)
        return counts

    @torch.compiler.disable
    def gathered(
        self,
        inner: AttentionBackend,
        query_BHTC: Tensor,
        key_BKTC: Tensor,
        value_BKTC: Tensor,
        mask: AttentionMask,
        scores: Scores,
    ) -> Tensor:
        """Attention by another backend over the keys of whole rows, all-gathered; their gradients are reduce-scattered.

        Queries of the front chunk attend to no key after it, and those of the back chunk to none after theirs: those keys are
        left out, and those before the window.
        """
        query_BHTC, key_BKTC, value_BKTC = map(to_autocast_dtype, (query_BHTC, key_BKTC, value_BKTC))
        width, local_rows = key_BKTC.shape[-1], self.local_rows(query_BHTC.shape[2])
        stacked = all_gather(torch.cat((key_BKTC, value_BKTC), dim=-1), self.axis, 0, gradient="partial")
        key_value_BKSC = in_order(stacked, self.ranks, dim=2)
        attended = []
        for piece in local_rows.tiles(local_rows.each):
            end = piece.last + 1
            begin = 0 if mask.window is None else max(0, piece.first - mask.window + 1)
            queries_BHTC, keys = query_BHTC[:, :, piece.here], slice(begin, end)
            key_BKSC, value_BKSC = key_value_BKSC[:, :, keys].split((width, value_BKTC.shape[-1]), dim=-1)
            if inner is sdpa and mask.dense is None and scores.softcap is None and scores.sinks_H is None:
                attended.append(
                    functional.scaled_dot_product_attention(
                        queries_BHTC,
                        key_BKSC,
                        value_BKSC,
                        attn_mask=causal_lower_right(local_rows.each, end),
                        scale=scores.scale,
                        enable_gqa=queries_BHTC.shape[1] != key_BKSC.shape[1],
                    )
                )
                continue
            assert mask.slots_BT is not None
            of_piece = mask._replace(
                slots_BT=(mask.slots_BT[:, piece.here] - begin).expand(len(queries_BHTC), -1),
                documents_BT=None if mask.documents_BT is None else mask.documents_BT[:, keys],
                dense=None if mask.dense is None else mask.dense[..., piece.here, keys],
            )
            attended.append(inner(queries_BHTC, key_BKSC, value_BKSC, of_piece, scores))
        return torch.cat(attended, dim=2)

    @torch.compiler.disable
    def ring(self, query_BHTC: Tensor, key_BKTC: Tensor, value_BKTC: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
        """Ring attention: keys and values are passed from rank to rank."""
        query_BHTC, key_BKTC, value_BKTC = map(to_autocast_dtype, (query_BHTC, key_BKTC, value_BKTC))
        with torch.autocast(query_BHTC.device.type, enabled=False):
            if can_fuse(query_BHTC, value_BKTC, mask, scores, self.ranks):
                return fused_ring_attention(query_BHTC, key_BKTC, value_BKTC, scores.scale, self.group)
            return ring_attention(query_BHTC, key_BKTC, value_BKTC, mask, scores, self.group)


def in_order(stacked: Tensor, ranks: int, dim: int) -> Tensor:
    """Whole rows along `dim` from the ranks' parts, which are stacked along the first dimension."""
    halves = [stack.chunk(2, dim) for stack in stacked.chunk(ranks, 0)]
    return torch.cat([front for front, _ in halves] + [back for _, back in reversed(halves)], dim)


def whole_rows(values_BT: Tensor, mesh: Mesh) -> Tensor:
    """Whole rows, (B, S), of values of this rank's tokens, in the order of `Layout.columns`; without gradients."""
    return in_order(all_gather(values_BT, mesh.context, 0, gradient="partial"), mesh.context.size(), dim=1)
