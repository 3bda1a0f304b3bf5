"""Context parallelism: the ranks of an axis share every row, and each attends from its own tokens to all of the row's.

Everything else in a decoder works on each token by itself, so attention alone is changed, and what a query may see. A rank has
two pieces of a row, one from the front and one from the back (`Layout.columns`), so that causal attention is even work.

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

from bessemer.distributed.differentiable import in_product_type
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.ring import Part, ring_attention
from bessemer.model.attention import Attention
from bessemer.model.attention_backends import AttentionBackend, Scores, blocked, sdpa
from bessemer.model.attention_mask import AttentionMask, attention_mask
from bessemer.model.decoder import Decoder
from bessemer.model.latent_attention import LatentAttention


def share_rows(model: nn.Module, mesh: Mesh, method: Literal["all_gather", "ring"]) -> None:
    """Let a model, or the part of one that this rank trains, read its part of every row; the others are on the context axis."""
    rows = SharedRows(mesh.context.get_group(), masks=method == "all_gather")
    for module in model.modules():
        if isinstance(module, Decoder):
            module.rows = rows
        elif isinstance(module, (Attention, LatentAttention)):
            inner = sdpa if module.backend is blocked else module.backend  # whose blocks are of whole rows
            module.backend = rows.ring if method == "ring" else partial(rows.gathered, inner)


class SharedRows:
    """Rows whose tokens are shared by the ranks of a group; see `bessemer.model.attention_mask.Rows`.

    masks: whether attention may want dense masks; without, they are made tile by tile.
    """

    def __init__(self, group: dist.ProcessGroup, *, masks: bool = True) -> None:
        self.group, self._masks = group, masks
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def part(self, length: int) -> Part:
        """Which places of a row the tokens here have, when they are so many."""
        return Part(self.rank, self.ranks, length)

    def attention_mask(
        self,
        queries: int,
        keys: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        window: int | None = None,
        slopes_H: Tensor | None = None,
        aligned: bool = True,
        dense: bool = True,
    ) -> AttentionMask:
        """Of the tokens here over those of whole rows. Plain causal attention has no mask."""
        assert slots_BT is None and queries == keys, "rows that are shared are not cached"
        whole = queries * self.ranks
        plain = documents_BT is None and slopes_H is None and (window is None or window >= whole)
        if documents_BT is not None:
            documents_BT = in_order(all_gather_tensor(documents_BT.contiguous(), 0, self.group), self.ranks, dim=1)
        return attention_mask(
            queries,
            whole,
            dtype,
            device,
            slots_BT=self.part(queries).places(device)[None],
            documents_BT=documents_BT,
            window=window,
            slopes_H=slopes_H,
            aligned=False,
            dense=dense and self._masks and not plain,
        )

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the ranks that share the rows."""
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
        """Attention by another backend over the keys of the whole rows, gathered from all ranks; their gradients go back.

        The front queries see no key behind their piece, and the back ones none behind theirs: those are left out, and what
        lies before the window.
        """
        query_BHTC, key_BKTC, value_BKTC = map(in_product_type, (query_BHTC, key_BKTC, value_BKTC))
        width, part = key_BKTC.shape[-1], self.part(query_BHTC.shape[2])
        stacked = all_gather_tensor_autograd(torch.cat((key_BKTC, value_BKTC), dim=-1), 0, self.group)
        key_value_BKSC = in_order(stacked, self.ranks, dim=2)
        attended = []
        for piece in part.tiles(part.each):
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
                        attn_mask=causal_lower_right(part.each, end),
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
        """Attention over keys and values that go round from rank to rank."""
        query_BHTC, key_BKTC, value_BKTC = map(in_product_type, (query_BHTC, key_BKTC, value_BKTC))
        with torch.autocast(query_BHTC.device.type, enabled=False):
            return ring_attention(query_BHTC, key_BKTC, value_BKTC, mask, scores, self.group)


def in_order(stacked: Tensor, ranks: int, dim: int) -> Tensor:
    """Parts of rows, those of the ranks one after the other along the first dimension, as whole rows along `dim`."""
    halves = [part.chunk(2, dim) for part in stacked.chunk(ranks, 0)]
    return torch.cat([front for front, _ in halves] + [back for _, back in reversed(halves)], dim)
