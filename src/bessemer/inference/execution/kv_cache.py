"""The paged KV cache (Kwon et al. 2023): keys and values in blocks of a few positions, which sequences hold by number.

Memory is allocated as a sequence grows, is shared between sequences with the same prefix, and is freed in blocks that fit
the next sequence. A layer's tensor for a block is called a page.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.inference.execution.batch import Batch
from bessemer.model.attention.base import KeyValueShape, variant_of_type, variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention_mask import alibi_slopes
from bessemer.model.quantisation.integers import pack, unpack

# Shapes: P pages, K key-value heads, M positions of a page, C channels of a key, V of a value, S slots, E kept steps.

#: Bytes of a cache line of the processor, to which memory is aligned.
_LINE = 64

#: Types that pages may have, by the name of the setting. Of int4, a byte holds two codes.
PAGE_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
}


def name_of_page_type(dtype: torch.dtype) -> str:
    """The setting's name for a type of pages; PyTorch's for one that no setting names, such as a model's own float64."""
    return next((name for name, known in PAGE_TYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _has_scales(dtype: torch.dtype) -> bool:
    return dtype in (torch.int8, torch.uint8)


def _numbers_each(dtype: torch.dtype) -> int:
    """Numbers that an element of a page holds."""
    return 2 if dtype == torch.uint8 else 1


class LayerGroup(NamedTuple):
    """Layers whose pages are allocated and freed together. window: positions that they attend to; None: all."""

    window: int | None
    layers: tuple[int, ...]


def layer_groups(config: ModelConfig, mtp_layers: int = 0) -> list[LayerGroup]:
    """The groups of a model's layers: those with full attention, then those with a window. Layers with states have no pages.

    mtp_layers: MTP modules that have pages too; they are numbered on behind the layers, and are of the last layer's kind.
    """
    layers: dict[int | None, list[int]] = {}
    for layer, layer_type in enumerate([*config.types, *[config.types[-1]] * mtp_layers]):
        if variant_of_type(config, layer_type).cache_shape(config) is not None:
            layers.setdefault(config.window(layer_type), []).append(layer)
    return [LayerGroup(window, tuple(layers[window])) for window in sorted(layers, key=lambda window: window is not None)]


class HeadShare(NamedTuple):
    """This process has share `rank` of `ranks` equal shares of the heads."""

    rank: int = 0
    ranks: int = 1


def page_shape(config: ModelConfig, ranks: int = 1) -> KeyValueShape:
    """The shape of a token in the pages, the same in every layer that has some. ranks: processes that share the heads."""
    shapes = [variant.cache_shape(config, ranks) for variant in variants_in(config)]
    return next((shape for shape in shapes if shape is not None), KeyValueShape(0, 0, 0))


def state_bytes(config: ModelConfig, dtype: torch.dtype, ranks: int = 1) -> int:
    """Memory of one sequence's states in all layers, in each of `ranks` processes that share the heads. dtype: the model's."""
    return sum(variant_of_type(config, kind).state_bytes(config, dtype.itemsize) for kind in config.types) // ranks


def block_bytes(config: ModelConfig, group: LayerGroup, block_size: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Memory of one block in all layers of a group, in each of the processes that share the heads."""
    shape = page_shape(config, ranks)
    scales = (1 if shape.shared else 2) * shape.heads * 4 if _has_scales(dtype) else 0
    return len(group.layers) * block_size * (shape.numbers * dtype.itemsize // _numbers_each(dtype) + scales)


@cache
def mixing_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of a power of two over its root, (size, size): symmetric, and its own inverse.

    Keys and values in int4 have their channels mixed by it, so that none is much larger than the others and 16 numbers are
    enough for a head (Ashkboos et al. 2024, QuaRot, arXiv 2404.00456).
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


class Pages(NamedTuple):
    """One layer's pages: keys (P, K, M, C), values (P, K, M, V), in int4 half as wide; in int8 and int4 with a scale per token
    and head, (P, K, M)."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


def unwritten_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a processor take no memory until they are written: PyTorch's own are written at once."""
    if device.type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _LINE, np.uint8))
    first = -memory.data_ptr() % _LINE
    return memory[first : first + size].view(dtype).view(tuple(shape))


def give_back(tensor: Tensor) -> None:
    """Give a tensor's whole storage on the host back to the system; it keeps its address, and is zero when it is read again.

    On Linux alone: elsewhere the memory stays, and the numbers too. What lies beside whole pages of the system is zeroed.
    """
    if sys.platform != "linux":
        return
    storage, page = tensor.untyped_storage(), mmap.PAGESIZE
    begin = storage.data_ptr()
    end = begin + storage.nbytes()
    first, last = -(-begin // page) * page, end // page * page
    if first >= last:
        ctypes.memset(begin, 0, end - begin)
        return
    ctypes.memset(begin, 0, first - begin)
    ctypes.memset(last, 0, end - last)
    ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


class PagedMemory:
    """The pages of all layers and the states of linear attention.

    Fresh memory is zero, and is not allocated until it is written; what earlier sequences left in a page is never read.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        state_slots: int = 0,
        kept_steps: int = 0,
        mtp_layers: int = 0,
        mtp_spare_blocks: int = 0,
        share: HeadShare = HeadShare(),  # noqa: B008 (a tuple)
        snapshots: int = 0,
        by_head: bool = False,
        spare: bool = False,
        longest: int | None = None,
    ) -> None:
        """blocks: how many, of each of `layer_groups`. kept_steps: most draft tokens of a sequence. snapshots: of states, which
        later sequences start from. longest: tokens of the longest text; the model's context when None.

        mtp_layers: MTP modules that have pages too, `mtp_spare_blocks` more of them than the layers. share: of the heads.
        by_head: a layer's pages lie head by head in memory, as FlexAttention reads them, whatever their shape says; the
        compiled kernels read them page by page. spare: one page more in each layer, the last, that no sequence holds.
        """
        assert not (mtp_spare_blocks and spare), "pages behind the sequences' own are the MTP modules'"
        self.config = config
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.groups = layer_groups(config, mtp_layers)
        self.kept_steps = kept_steps
        self.share = share
        self.shape = page_shape(config, share.ranks)
        self.by_head = by_head
        self.has_spare = spare
        #: ALiBi's penalties, of the heads that lie here; None in models without.
        self.slopes_H: Tensor | None = None
        if config.position_type == "alibi":
            self.slopes_H = alibi_slopes(config.num_attention_heads).chunk(share.ranks)[share.rank].to(self.device)
        #: Tokens of the longest text, and its pages.
        self.longest = longest or config.max_position_embeddings
        self.table_width = -(-self.longest // block_size)
        self.group_of = {layer: index for index, group in enumerate(self.groups) for layer in group.layers}
        self.layers: dict[int, Pages] = {}
        for count, group in zip(blocks, self.groups, strict=True):
            for layer in group.layers:
                more = mtp_spare_blocks if layer >= config.num_hidden_layers else int(spare)
                self.layers[layer] = self._pages(count + more)
        self.states: dict[int, tuple[Tensor, ...]] = {}
        self.snapshots: dict[int, tuple[Tensor, ...]] = {}
        self.state_slots = state_slots
        self.snapshot_count = snapshots
        #: Bytes of each storage while they are released.
        self._released: list[int] = []

    def _pages(self, count: int) -> Pages:
        shape, tokens = self.shape, (count, self.shape.heads, self.block_size)
        key_width, value_width = (width // _numbers_each(self.dtype) for width in (shape.key_width, shape.value_width))
        keys = self._zeros((*tokens, key_width))
        values = keys[..., :value_width] if shape.shared else self._zeros((*tokens, value_width))
        if not _has_scales(self.dtype):
            return Pages(keys, values, None, None)
        key_scales = torch.zeros(tokens, device=self.device)
        return Pages(keys, values, key_scales, key_scales if shape.shared else torch.zeros(tokens, device=self.device))

    def _zeros(self, shape: tuple[int, int, int, int]) -> Tensor:
        blocks, heads, *page = shape
        if self.by_head:
            return unwritten_zeros((heads, blocks, *page), self.dtype, self.device).transpose(0, 1)
        return unwritten_zeros(shape, self.dtype, self.device)

    @property
    def type_name(self) -> str:
        """The type of the pages, in a word."""
        return name_of_page_type(self.dtype)

    def window_of(self, layer: int) -> int | None:
        """How many positions a layer with pages attends to; None: all."""
        return self.groups[self.group_of[layer]].window

    def pages_of(self, group: int) -> int:
        """The most pages that a layer of a group has."""
        return max(len(self.layers[layer].keys) for layer in self.groups[group].layers)

    @property
    def nbytes(self) -> int:
        """Memory of all pages, states not counted."""
        return sum(tensor.nbytes for layer in self.layers for tensor in self.stored(layer))

    def release(self) -> None:
        """Free the memory of all pages and states, which no sequence holds, until `restore`."""
        self.states.clear()
        self.snapshots.clear()
        self._released = []
        for storage in self._storages():
            if self.device.type == "cpu":
                give_back(torch.empty(0, dtype=torch.uint8).set_(storage))
            else:
                self._released.append(storage.nbytes())
                storage.resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Have the memory again, at addresses that may be others. Fresh memory is zero."""
        if self.device.type != "cpu":
            for storage, size in zip(self._storages(), self._released, strict=True):
                storage.resize_(size)
            for layer in self.layers:
                for tensor in self.stored(layer):
                    tensor.zero_()

    def _storages(self) -> list[torch.UntypedStorage]:
        """The storage of every tensor of pages, in order."""
        return [tensor.untyped_storage() for layer in self.layers for tensor in self.stored(layer)]

    def stored(self, layer: int) -> list[Tensor]:
        """The tensors of a layer's pages; where values are part of the keys, the keys alone."""
        pages = self.layers[layer]
        kept = pages if not self.shape.shared else (pages.keys, pages.key_scales)
        return [tensor for tensor in kept if tensor is not None]

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks, (group, from, to), in all layers of their group."""
        for index, group in enumerate(self.groups):
            pairs = [(source, target) for where, source, target in copies if where == index]
            if not pairs:
                continue
            sources, targets = torch.tensor(pairs, device=self.device).T
            for layer in group.layers:
                for tensor in self.stored(layer):
                    tensor[targets] = tensor[sources]

    def write(self, layer: int, blocks_N: Tensor, places_N: Tensor, key_NKC: Tensor, value_NKV: Tensor) -> None:
        """Put new keys and values where they belong."""
        pages = self.layers[layer]
        self._write(pages.keys, pages.key_scales, blocks_N, places_N, key_NKC)
        if not self.shape.shared:
            self._write(pages.values, pages.value_scales, blocks_N, places_N, value_NKV)

    def _write(self, pages: Tensor, scales: Tensor | None, blocks_N: Tensor, places_N: Tensor, new_NKC: Tensor) -> None:
        if scales is not None:
            is_int4 = pages.dtype == torch.uint8
            wide_NKC = self._mixed(new_NKC.float()) if is_int4 else new_NKC.float()
            above_NK, below_NK = wide_NKC.amax(-1), -wide_NKC.amin(-1)
            # the code -8 has no opposite: it is the number of the largest magnitude, whose sign the scale has then
            steps_NK = torch.where(above_NK > below_NK, -8.0, 8.0) if is_int4 else 127
            scale_NK = torch.maximum(above_NK, below_NK) / steps_NK
            scales[blocks_N, :, places_N] = scale_NK
            least = torch.finfo(torch.float32).tiny
            new_NKC = (wide_NKC / scale_NK.where(scale_NK.abs() >= least, least)[..., None]).round()
            if is_int4:
                new_NKC = pack(new_NKC.clamp(-8, 7).add_(8).to(torch.uint8))
        pages[blocks_N, :, places_N] = new_NKC.to(pages.dtype)

    def _mixed(self, heads: Tensor) -> Tensor:
        """The channels of heads (…, C), mixed in groups that divide keys and values; mixed twice they are as before."""
        both = self.shape.key_width | self.shape.value_width
        matrix = mixing_matrix(both & -both).to(heads.device)
        return (heads.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)

    def clear(self, layer: int, blocks: Tensor) -> None:
        """Make some pages zero; not of coded ones, whose numbers are always finite."""
        pages = self.layers[layer]
        pages.keys.index_fill_(0, blocks, 0)
        if not self.shape.shared:
            pages.values.index_fill_(0, blocks, 0)

    def read(self, layer: int, blocks_BP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of rows of blocks, one after the other, (B, K, P M, C) and (B, K, P M, V)."""
        pages, keys_BKSC = self.layers[layer], self.read_keys(layer, blocks_BP, dtype)
        if self.shape.shared:
            return keys_BKSC, keys_BKSC[..., : self.shape.value_width]
        return keys_BKSC, self._read(pages.values, pages.value_scales, blocks_BP, dtype)

    def read_keys(self, layer: int, blocks_BP: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys of rows of blocks, (B, K, P M, C)."""
        pages = self.layers[layer]
        return self._read(pages.keys, pages.key_scales, blocks_BP, dtype)

    def _read(self, pages: Tensor, scales: Tensor | None, blocks_BP: Tensor, dtype: torch.dtype) -> Tensor:
        # (B, P, K, M, C)
        taken = pages[blocks_BP]
        if pages.dtype == torch.uint8:
            assert scales is not None, "codes have scales"
            taken = self._mixed((unpack(taken).float() - 8) * scales[blocks_BP][..., None])
        elif scales is not None:
            taken = taken.float() * scales[blocks_BP][..., None]
        return taken.to(dtype).transpose(1, 2).flatten(2, 3)

    def read_state(self, layer: int, slots_B: Tensor) -> tuple[Tensor, ...] | None:
        """The states of some sequences; None where the layer has kept none yet, which counts as all zeros."""
        stored = self.states.get(layer)
        return None if stored is None else tuple(part[slots_B, 0] for part in stored)

    def write_state(self, layer: int, state: tuple[Tensor, ...], slots_B: Tensor, step: int | None) -> None:
        """Store states of some sequences. step: of the draft token that they follow, for `keep_states`; None: current ones."""
        if layer not in self.states:
            shape = (self.state_slots, 1 + 1 + self.kept_steps)
            self.states[layer] = tuple(part.new_zeros((*shape, *part.shape[1:])) for part in state)
        for stored, part in zip(self.states[layer], state, strict=True):
            stored[slots_B, 0 if step is None else 1 + step] = part.to(stored.dtype)

    def save_state(self, layer: int, state: tuple[Tensor, ...], rows_R: Tensor, snapshots_R: Tensor) -> None:
        """Keep some of these states under the numbers of snapshots."""
        if layer not in self.snapshots:
            self.snapshots[layer] = tuple(part.new_zeros((self.snapshot_count, *part.shape[1:])) for part in state)
        for stored, part in zip(self.snapshots[layer], state, strict=True):
            stored[snapshots_R] = part[rows_R].to(stored.dtype)

    def restore_states(self, restored: Sequence[tuple[int, int]]) -> None:
        """Let slots begin with saved states, (snapshot, slot)."""
        snapshots, slots = torch.tensor(restored, device=self.device).T
        for layer, saved in self.snapshots.items():
            for stored, part in zip(self.states[layer], saved, strict=True):
                stored[slots, 0] = part[snapshots]

    def begin_states(self, slots_B: Tensor) -> None:
        """Zero the states of these slots, in which new sequences begin."""
        for stored in self.states.values():
            for part in stored:
                part.index_fill_(0, slots_B, 0)

    def remember_states(self, slot: int, step: int) -> None:
        """Copy a sequence's present state to where that after `step` more tokens is kept."""
        for stored in self.states.values():
            for part in stored:
                part[slot, 1 + step] = part[slot, 0]

    def keep_states(self, kept: Sequence[tuple[int, int]]) -> None:
        """Reset slots, (slot, accepted tokens), to the state after the accepted tokens; every step of them was kept."""
        if not kept:
            return
        slots, steps = torch.tensor(kept, device=self.device).T
        for stored in self.states.values():
            for part in stored:
                part[slots, 0] = part[slots, steps]


def new_slots(batch: Batch) -> list[int]:
    """Slots of the batch's sequences that begin."""
    return [slot for slot, start in zip(batch.slots, batch.starts, strict=False) if batch.positions[start] == 0]
