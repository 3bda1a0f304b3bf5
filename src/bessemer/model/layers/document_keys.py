"""Keys of packed documents in blocks, as the engine's paged attention reads them.

Shapes: B rows of a batch, T tokens of a row, N tokens of all rows, K key-value heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

#: Positions of a block of keys; the results do not depend on it.
BLOCK = 32


class DocumentKeys:
    """Where the keys of packed documents lie in blocks: what `paged_attention` needs, and the rows to copy there."""

    def __init__(self, documents_BT: Tensor | None, visible_to_BT: Tensor | None, batch: int, length: int) -> None:
        """documents_BT, visible_to_BT: of the `AttentionMask` of `batch` rows of `length` tokens without a cache."""
        starts, positions, tables, rows, slots = [0], [], [], [], []
        order: list[Tensor] = []
        blocks = 0
        columns_T = torch.arange(length)
        for row in range(batch):
            for own_T, seen_T in self._of_row(documents_BT, visible_to_BT, row, columns_T):
                used = -(-len(seen_T) // BLOCK)
                order.append(row * length + own_T)
                positions.append(torch.arange(len(seen_T) - len(own_T), len(seen_T), dtype=torch.int32))
                starts.append(starts[-1] + len(own_T))
                tables.append(torch.arange(blocks, blocks + used, dtype=torch.int32))
                rows.append(row * length + seen_T)
                slots.append(blocks * BLOCK + torch.arange(len(seen_T)))
                blocks += used
        width = max(len(table) for table in tables)
        #: Rows of the batch in the order of the sequences, and the sequences' place of each row.
        self.order_N = torch.cat(order)
        self.inverse_N = torch.argsort(self.order_N)
        self.starts = torch.tensor(starts)
        self.positions = torch.cat(positions)
        self.tables = torch.stack([functional.pad(table, (0, width - len(table)), value=-1) for table in tables])
        #: Rows of the keys and their places among the blocks' positions.
        self.rows, self.slots, self.blocks = torch.cat(rows), torch.cat(slots), blocks

    @staticmethod
    def _of_row(
        documents_BT: Tensor | None, visible_to_BT: Tensor | None, row: int, columns_T: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each document of a row the columns of its tokens, and those that its last token sees, which end with them."""
        if documents_BT is None:
            yield columns_T, columns_T
            return
        documents_T = documents_BT[row]
        for document in documents_T.unique().tolist():
            own_T = columns_T[documents_T == document]
            seen = documents_T == document
            if visible_to_BT is not None:
                seen = (documents_T <= document) & (visible_to_BT[row] >= document)
            yield own_T, columns_T[seen & (columns_T <= own_T[-1])]

    def paged(self, heads_BKTC: Tensor) -> Tensor:
        """Keys or values in blocks, (blocks, K, positions, C)."""
        flat_NKC = heads_BKTC.transpose(1, 2).flatten(0, 1)
        placed = flat_NKC.new_zeros(self.blocks * BLOCK, *flat_NKC.shape[1:])
        placed[self.slots] = flat_NKC[self.rows]
        return placed.unflatten(0, (self.blocks, BLOCK)).transpose(1, 2).contiguous()
