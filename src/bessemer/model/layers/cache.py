"""The KV cache: keys, values and states of earlier tokens, kept so that each is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.model.attention.base import is_recurrent, variant_of
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention_backends import AttentionBackend, Scores
from bessemer.model.layers.attention_mask import AttentionMask

# Shapes: B batch, H query heads, K key-value heads, S slots (cached positions), T new tokens, C channels of a head, V of a
# value head.


class Rectangle(NamedTuple):
    """Sequences of a ragged batch that have equally many new tokens: rows_BT, which tokens of the batch are theirs, and
    slots_B, where their states lie. `every_step`: the state after each token is kept, because some may be taken back.
    snapshots: after how many tokens states are kept for others too, (2, R): of which of the sequences, under which numbers.
    Rectangles are computed in their order: a sequence may go on in a later one."""

    rows_BT: Tensor
    slots_B: Tensor
    every_step: bool
    snapshots: dict[int, Tensor]


class AttentionInputs(NamedTuple):
    """What a layer of attention gives a cache: its new tokens' queries, keys and values, and how it attends."""

    query_BHTC: Tensor
    key_BKTC: Tensor
    value_BKTV: Tensor
    mask: AttentionMask
    scores: Scores
    backend: AttentionBackend


class Cache(Protocol):
    """What a decoder asks of a cache: here `DecoderCache`, in the engine pages (`inference/execution/kv_cache.py`)."""

    @property
    def live(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def masked(self) -> bool:
        """Whether attention needs an `AttentionMask`; a cache that knows itself what each token sees does without."""

    @property
    def aligned(self) -> bool:
        """Whether all sequences are equally long."""

    @property
    def real_BT(self) -> Tensor | None:  # noqa: N802
        """Of the last extension, which new tokens are real, (B, T); None when all are."""

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        """Make room for `count` more tokens a row, before the layers come; their positions, (B, T)."""

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """Store one layer's new keys and values; what the queries make of all that they may see, (B, H, T, V)."""

    def rectangles(self) -> list[Rectangle] | None:
        """Of a ragged batch, its sequences by number of new tokens; None where a row is a sequence."""

    def state(self, layer: int, rectangle: Rectangle | None = None) -> tuple[Tensor, ...] | None:
        """What a layer of linear attention stored last, of the sequences of a rectangle; None at the beginning."""

    def store_state(self, layer: int, *state: Tensor, rectangle: Rectangle | None = None, step: int | None = None) -> None:
        """Keep a layer's state, tensors with a row per sequence. step: how many new tokens it follows, where several exist."""


class DecoderCache:
    """Room for `capacity` tokens of each of `batch_size` sequences, all layers, allocated once.

    Every sequence starts at slot 0 and has its own length, so a batch of different lengths is padded on the right,
    where causal attention does not look. `lengths` lives on the host: choosing a path never waits for a device.

    A layer of attention keeps keys and values, one of latent attention the latent and the shared rotary key, one of
    linear attention a state that does not grow. A state cannot be taken back: `shorten` then only takes off what
    `extend` was given as padding.
    """

    masked = True

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
        self.capacity = capacity
        self._device = torch.device(device)
        for layer in range(config.num_hidden_layers):
            shape = variant_of(config, layer).cache_shape(config)
            if shape is None:
                continue
            # zeros: masked slots have weight 0, and 0 times a NaN of fresh memory is NaN
            slots = (batch_size, shape.heads, capacity)
            if not shape.shared:
                self._values[layer] = torch.zeros((*slots, shape.value_width), dtype=dtype, device=device)
            self._keys[layer] = torch.zeros((*slots, shape.key_width), dtype=dtype, device=device)
        self.lengths: list[int] = [0] * batch_size
        self._has_states = is_recurrent(config)
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

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        keys_BKSC = self._append(self._keys[layer], inputs.key_BKTC)
        if layer in self._values:
            values_BKSV = self._append(self._values[layer], inputs.value_BKTV)
        else:
            # the values are the first channels of the keys
            values_BKSV = keys_BKSC[..., : inputs.value_BKTV.shape[-1]]
        return inputs.backend(inputs.query_BHTC, keys_BKSC, values_BKSV, inputs.mask, inputs.scores)

    def _append(self, stored_BKSC: Tensor, new_BKTC: Tensor) -> Tensor:
        """Put new keys or values in their slots; returns all that live, (B, K, S, C)."""
        if isinstance(self._slots, slice):
            stored_BKSC[:, :, self._slots] = new_BKTC
        else:
            # assignment by index, unlike by slice, does not cast, and autocast gives bfloat16 here
            rows_B1, slots_BT = self._slots
            stored_BKSC[rows_B1, :, slots_BT] = new_BKTC.transpose(1, 2).to(stored_BKSC.dtype)
        return stored_BKSC[:, :, : self.live]

    def rectangles(self) -> list[Rectangle] | None:
        return None

    def state(self, layer: int, rectangle: Rectangle | None = None) -> tuple[Tensor, ...] | None:
        assert rectangle is None
        return self._states.get(layer)

    def store_state(self, layer: int, *state: Tensor, rectangle: Rectangle | None = None, step: int | None = None) -> None:
        assert rectangle is None and step is None
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
