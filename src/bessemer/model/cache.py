"""The key-value cache: what earlier tokens showed to attention, kept so that each is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig

# Shapes: L layers, B batch, K key-value heads, S slots (cached positions), T new tokens, C channels of a head.


class KeyValueCache:
    """Room for `capacity` tokens of each of `batch_size` sequences, all layers, allocated once.

    Every sequence starts at slot 0 and has its own length, so a batch of different lengths is padded on the right,
    where causal attention does not look. `lengths` lives on the host: choosing a path never waits for a device.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        # zeros, because a slot that is not seen has weight 0, and 0 times what lies in fresh memory may be NaN
        self._keys_LBKSC = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBKSC = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths: list[int] = [0] * batch_size
        self._slots: slice | tuple[Tensor, Tensor] = slice(0, 0)

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return self._keys_LBKSC.shape[3]

    def extend(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Make room for `count` more tokens of every sequence, before the layers append theirs.

        Returns their positions, (B, T), and which slots each may see, (B, 1, T, S), true where it may; None when
        plain causal attention, or a single token that sees everything, is right.
        """
        starts, device = self.lengths, self._keys_LBKSC.device
        live = max(starts) + count
        assert live <= self.capacity, f"{live} tokens do not fit a cache of {self.capacity}"
        self.lengths = [start + count for start in starts]
        steps_T = torch.arange(count, device=device)
        if min(starts) == max(starts):
            start = starts[0]
            self._slots = slice(start, live)
            positions_BT = (steps_T + start).expand(self.batch_size, count)
            if start == 0 or count == 1:
                return positions_BT, None
        else:
            positions_BT = steps_T + torch.tensor(starts, device=device)[:, None]
            self._slots = (torch.arange(self.batch_size, device=device)[:, None], positions_BT)
        return positions_BT, (torch.arange(live, device=device) <= positions_BT[..., None])[:, None]

    def append(self, layer: int, key_BKTC: Tensor, value_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all that live, each (B, K, S, C)."""
        keys_BKSC, values_BKSC = self._keys_LBKSC[layer], self._values_LBKSC[layer]
        if isinstance(self._slots, slice):
            keys_BKSC[:, :, self._slots] = key_BKTC
            values_BKSC[:, :, self._slots] = value_BKTC
        else:
            rows_B1, slots_BT = self._slots  # an index put, unlike a slice, casts nothing: autocast gives bfloat16 here
            keys_BKSC[rows_B1, :, slots_BT] = key_BKTC.transpose(1, 2).to(keys_BKSC.dtype)
            values_BKSC[rows_B1, :, slots_BT] = value_BKTC.transpose(1, 2).to(values_BKSC.dtype)
        live = max(self.lengths)
        return keys_BKSC[:, :, :live], values_BKSC[:, :, :live]

    def shorten(self, lengths: Sequence[int]) -> None:
        """Forget what lies beyond each sequence's new length: padding of a batch, rejected drafts."""
        assert len(lengths) == self.batch_size and all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        index = torch.tensor(rows, device=self._keys_LBKSC.device)
        self._keys_LBKSC = self._keys_LBKSC.index_select(1, index)
        self._values_LBKSC = self._values_LBKSC.index_select(1, index)
        self.lengths = [self.lengths[row] for row in rows]
