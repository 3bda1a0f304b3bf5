"""Context parallelism: the tokens of every row are sharded over an axis, and each rank attends from its own to all of the row.

Everything else in a decoder works on each token by itself, so only attention and its mask change. A rank has two chunks of a
row, one from the front and one from the back (`Layout.columns`), so that causal attention is balanced.

Shapes: B batch, T tokens of a row that are here, S tokens of whole rows, H query heads, K key-value heads, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, all_gather_tensor_autograd
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from bessemer.distributed.differentiable import to_autocast_dtype
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.ring import RowShard, ring_attention
from bessemer.model.attention import Attention
from bessemer.model.attention_backends import AttentionBackend, Scores, blocked, sdpa
from bessemer.model.attention_mask import AttentionMask, attention_mask
from bessemer.model.decoder import Decoder
from bessemer.model.latent_attention import LatentAttention


def apply_context_parallel(model: nn.Module, mesh: Mesh, method: Literal["all_gather", "ring"]) -> None:
    """Make a model, or a stage of it, compute on this rank's part of every row; the other parts are on the context axis."""
    rows = ContextParallelRows(mesh.context.get_group(), masks=method == "all_gather")
    for module in model.modules():
        if isinstance(module, Decoder):
            module.rows = rows
        elif isinstance(module, (Attention, LatentAttention)):
            # blocked attention needs whole rows
            inner = sdpa if module.backend is blocked else module.backend
            module.backend = rows.ring if method == "ring" else partial(rows.gathered, inner)


class ContextParallelRows:
    """Rows whose tokens are sharded over the ranks of a group; implements the model's protocol `Rows`.

    masks: whether attention may need them; without, ring attention masks tile by tile.
    """

    def __init__(self, group: dist.ProcessGroup, *, masks: bool = True) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
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
        """Of the tokens here over those of whole rows. Plain causal attention has no mask."""
        assert slots_BT is None and queries == keys, "rows that are shared are not cached"
        assert visible_to_BT is None, "documents of rows that are shared share nothing"
        whole = queries * self.ranks
        plain = documents_BT is None and slopes_H is None and (window is None or window >= whole)
        if documents_BT is not None:
            documents_BT = in_order(all_gather_tensor(documents_BT.contiguous(), 0, self.group), self.ranks, dim=1)
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
        stacked = all_gather_tensor_autograd(torch.cat((key_BKTC, value_BKTC), dim=-1), 0, self.group)
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
            return ring_attention(query_BHTC, key_BKTC, value_BKTC, mask, scores, self.group)


def in_order(stacked: Tensor, ranks: int, dim: int) -> Tensor:
    """Whole rows along `dim` from the ranks' parts, which are stacked along the first dimension."""
    halves = [stack.chunk(2, dim) for stack in stacked.chunk(ranks, 0)]
    return torch.cat([front for front, _ in halves] + [back for _, back in reversed(halves)], dim)


def whole_rows(values_BT: Tensor, mesh: Mesh) -> Tensor:
    """Whole rows, (B, S), of values of this rank's tokens, in the order of `Layout.columns`; without gradients."""
    return in_order(all_gather_tensor(values_BT.contiguous(), 0, mesh.context.get_group()), mesh.context.size(), dim=1)
