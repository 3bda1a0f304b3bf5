"""The cache: what earlier tokens showed to the layers, kept so that each is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig

# Shapes: B batch, K key-value heads, S slots (cached positions), T new tokens, C channels of a head.


class DecoderCache:
    """Room for `capacity` tokens of each of `batch_size` sequences, all layers, allocated once.

    Every sequence starts at slot 0 and has its own length, so a batch of different lengths is padded on the right,
    where causal attention does not look. `lengths` lives on the host: choosing a path never waits for a device.

    A layer of attention keeps keys and values, one of latent attention the latent and the shared rotary key, one of
    linear attention a state that does not grow. A state cannot be taken back: `shorten` then only takes off what
    `extend` was told is padding.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}
        self.capacity, self._device = capacity, torch.device(device)
        for layer, kind in enumerate(config.types):
            if kind == "linear_attention":
                continue
            # zeros, because a slot that is not seen has weight 0, and 0 times what lies in fresh memory may be NaN
            if config.kv_lora_rank is not None:
                heads, key_width, value_width = 1, config.kv_lora_rank, config.qk_rope_head_dim
            else:
                heads, key_width, value_width = config.num_key_value_heads, config.head_dim, config.head_dim
            shape = (batch_size, heads, capacity)
            self._keys[layer] = torch.zeros((*shape, key_width), dtype=dtype, device=device)
            self._values[layer] = torch.zeros((*shape, value_width), dtype=dtype, device=device)
        self.lengths: list[int] = [0] * batch_size
        self._has_states = "linear_attention" in config.types
        self._slots: slice | tuple[Tensor, Tensor] = slice(0, 0)
        #: Of the last extension, which new tokens are real, (B, T); None when all are.
        self.real_BT: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return sum(tensor.nbytes for store in (self._keys, self._values) for tensor in store.values())

    @property
    def live(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def aligned(self) -> bool:
        """Whether all sequences are equally long."""
        return min(self.lengths) == max(self.lengths)

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        """Make room for `count` more tokens of every sequence, before the layers append theirs; their positions, (B, T).

        real: how many of the new tokens are no padding, per sequence; all when None.
        """
        starts = self.lengths
        live = max(starts) + count
        assert live <= self.capacity, f"{live} tokens do not fit a cache of {self.capacity}"
        assert real is not None or not self._has_states or min(starts) == max(starts) or count == 1, "give `real`"
        self.lengths = [start + count for start in starts]
        steps_T = torch.arange(count, device=self._device)
        self.real_BT = None if real is None else steps_T < torch.tensor(real, device=self._device)[:, None]
        if min(starts) == max(starts):
            self._slots = slice(starts[0], live)
            return (steps_T + starts[0]).expand(self.batch_size, count)
        positions_BT = steps_T + torch.tensor(starts, device=self._device)[:, None]
        self._slots = (torch.arange(self.batch_size, device=self._device)[:, None], positions_BT)
        return positions_BT

    def append(self, layer: int, key_BKTC: Tensor, value_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all that live, each (B, K, S, C)."""
        keys_BKSC, values_BKSC = self._keys[layer], self._values[layer]
        if isinstance(self._slots, slice):
            keys_BKSC[:, :, self._slots] = key_BKTC
            values_BKSC[:, :, self._slots] = value_BKTC
        else:
            rows_B1, slots_BT = self._slots  # an index put, unlike a slice, casts nothing: autocast gives bfloat16 here
            keys_BKSC[rows_B1, :, slots_BT] = key_BKTC.transpose(1, 2).to(keys_BKSC.dtype)
            values_BKSC[rows_B1, :, slots_BT] = value_BKTC.transpose(1, 2).to(values_BKSC.dtype)
        return keys_BKSC[:, :, : self.live], values_BKSC[:, :, : self.live]

    def state(self, layer: int) -> tuple[Tensor, ...] | None:
        """What a layer of linear attention stored last; None at the beginning."""
        return self._states.get(layer)

    def store_state(self, layer: int, *state: Tensor) -> None:
        """Keep a layer's state, tensors with a row per sequence."""
        self._states[layer] = state

    def shorten(self, lengths: Sequence[int]) -> None:
        """Forget what lies beyond each sequence's new length: padding of a batch, rejected drafts."""
        assert len(lengths) == self.batch_size and all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        if self._has_states and list(lengths) != self.lengths:
            assert self.real_BT is not None, "linear attention's state cannot be taken back"
        self.lengths = list(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        index = torch.tensor(rows, device=self._device)
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, index)
        self._states = {layer: tuple(part.index_select(0, index) for part in state) for layer, state in self._states.items()}
        self.lengths = [self.lengths[row] for row in rows]
