"""Paged attention in place: FlexAttention (Dong et al. 2024) over a list of pages for every tile of queries.

A block mask says which blocks of keys a block of queries looks at. Its blocks of keys are pages here, named by their number in
memory, so nothing is copied together; whether a single key may be seen is asked with its place in memory, from which its
position in the text is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from bessemer.inference.execution.batch import Batch, StepInputs
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.execution.paged_attention import GatheredBatch, PagedBatch
from bessemer.model.layers.attention_backends import Scores, capped
from bessemer.model.layers.cache import AttentionInputs

# Shapes: B tiles, T queries of a tile, N new tokens, H query heads, K key-value heads, P pages, M positions of a page,
# W pages of the longest text, C channels of a key, V of a value.

#: A position that no text reaches, and that 32 bits hold together with a place in a page.
_NOWHERE = 1 << 30
#: Sizes of a tile in queries: for one decoded token, for draft tokens, for a prompt. The smallest that holds a sequence's new
#: tokens is used.
TILES = (1, 16, 128)


class PageMask(NamedTuple):
    """Which pages of a group each tile of queries attends to, all int32.

    positions_BT: of each query, rising. counts_B11 and pages_B11W: how many pages a tile attends to, and which.
    begins_BP: the position of the first token of every page; where the tile does not attend to it, one that is never reached.
    """

    positions_BT: Tensor
    counts_B11: Tensor
    pages_B11W: Tensor
    begins_BP: Tensor


def page_mask(tables_BW: Tensor, positions_BT: Tensor, window: int | None, block_size: int, pages: int) -> PageMask:
    """The mask of tiles, from their block tables; all on the device. A tile whose positions are -1 attends to nothing."""
    device, width = tables_BW.device, tables_BW.shape[1]
    positions_BT = positions_BT.to(torch.int32)
    oldest_B1 = torch.zeros_like(positions_BT[:, :1])
    if window is not None:
        oldest_B1 = (positions_BT[:, :1] - window + 1).clamp(min=0) // block_size
    counts_B1 = positions_BT[:, -1:].div(block_size, rounding_mode="floor") - oldest_B1 + 1
    columns_W = torch.arange(width, dtype=torch.int32, device=device)
    columns_BW = (oldest_B1 + columns_W).clamp(max=width - 1)
    listed_BW = columns_W < counts_B1
    pages_BW = torch.where(listed_BW, tables_BW.gather(1, columns_BW.long()), 0)
    begins_BP = torch.full((len(tables_BW), pages + 1), _NOWHERE, dtype=torch.int32, device=device)
    begins_BP.scatter_(1, torch.where(listed_BW, pages_BW, pages).long(), columns_BW * block_size)
    # the kernel for processors needs a list with room for all pages
    if device.type == "cpu":
        pages_BW = functional.pad(pages_BW, (0, max(0, pages - width)))
    return PageMask(
        positions_BT, counts_B1[:, None].to(torch.int32), pages_BW[:, None, None].to(torch.int32), begins_BP[:, :pages]
    )


#: (B, H, T, C) queries over a layer's pages: (B, H, T, V). `page_attention` compiled, or what stands in for it in tests.
PageAttention = Callable[[Tensor, Tensor, Tensor, PageMask, Scores, int | None, Tensor | None], Tensor]


def page_attention(
    query_BHTC: Tensor,
    keys_PKMC: Tensor,
    values_PKMV: Tensor,
    mask: PageMask,
    scores: Scores,
    window: int | None,
    slopes_H: Tensor | None,
) -> Tensor:
    """softmax(q kᵀ · scale) v of every query over the keys it attends to, (B, H, T, V), in the pages' type.

    The pages lie head by head in memory (`PagedMemory(by_head=True)`). Uncompiled it makes all scores of all pages: to be used
    as `compiled_page_attention()`. `mask` is made outside: PyTorch 2.13's CPU kernel reads a mask's tensors wrongly where they
    are computed in the compiled function. No pages are listed as attended to whole, which would save the mask of each key:
    the kernel for short queries shares the pages out among processors by their number only where there are none such.
    """
    pages, heads, block_size, _ = keys_PKMC.shape
    queries = query_BHTC.shape[2]
    group = query_BHTC.shape[1] // heads
    positions_BT, begins_BP = mask.positions_BT, mask.begins_BP

    def position(tile: Tensor, key: Tensor) -> Tensor:
        return begins_BP[tile, key // block_size] + key % block_size

    def may_see(tile: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = positions_BT[tile, query] - position(tile, key)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def changed(score: Tensor, tile: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = capped(score, scores.softcap)
        if slopes_H is not None:
            score = score - slopes_H[head] * (positions_BT[tile, query] - position(tile, key))
        return score

    # a block of queries is a whole tile, and divides into what the kernels compute at once: a tile's heads of one group
    tile_rows = max(128, 1 << (queries * group - 1).bit_length())
    block_mask = BlockMask.from_kv_blocks(
        mask.counts_B11,
        mask.pages_B11W,
        BLOCK_SIZE=(tile_rows, block_size),
        mask_mod=may_see,
        seq_lengths=(queries, pages * block_size),
        compute_q_blocks=False,
    )
    keys_1KSC, values_1KSV = (part.transpose(0, 1).flatten(1, 2)[None] for part in (keys_PKMC, values_PKMV))
    attended = flex_attention(
        query_BHTC.to(keys_PKMC.dtype),
        keys_1KSC,
        values_1KSV,
        score_mod=None if scores.softcap is None and slopes_H is None else changed,
        block_mask=block_mask,
        scale=scores.scale,
        enable_gqa=group > 1,
        return_aux=None if scores.sinks_H is None else AuxRequest(lse=True),
        kernel_options=_tile_sizes(queries, block_size) if query_BHTC.device.type == "cuda" else None,
    )
    if isinstance(attended, Tensor):
        return attended
    # a sink takes part in the sum alone: with the log ℓ of the sum, all weights shrink by σ(ℓ - sink)
    attended_BHTV, aux = attended
    assert scores.sinks_H is not None and aux.lse is not None
    return attended_BHTV * torch.sigmoid(aux.lse - scores.sinks_H[:, None]).to(attended_BHTV.dtype)[..., None]


def _tile_sizes(queries: int, block_size: int) -> FlexKernelOptions:
    """Tile sizes of the GPU kernel: keys of one page at most; of long tiles 64 queries."""
    keys = min(block_size, 64)
    return {"BLOCK_N": keys} if queries < TILES[-1] else {"BLOCK_N": keys, "BLOCK_M": 64}


@cache
def compiled_page_attention() -> PageAttention:
    """`page_attention`, compiled for each shape that comes: numbers of tiles are rounded up to powers of two, all else is the
    model's and the memory's. More shapes than there can be are an error, not a fall back to the uncompiled function."""
    # PyTorch 2.13 takes a limit for one function, and its overloads do not say so
    return torch.compile(page_attention, dynamic=False, fullgraph=True, recompile_limit=256)  # type: ignore[call-overload,no-any-return]


class Tiles(NamedTuple):
    """New tokens of several sequences in tiles of queries.

    rows_BT: the token of each query, padding repeated. real_R and places_R: the tokens that are no padding, and where they
    lie in (B T). Both None: tile b is token b.
    """

    rows_BT: Tensor | None
    real_R: Tensor | None
    places_R: Tensor | None
    mask: PageMask


class PageGroup(NamedTuple):
    """Where the new tokens of one group of layers go, and what they attend to.

    begun: pages whose first token is among them. They are cleared, because what another sequence left there may be anything:
    it is masked, but a number that is not finite would show through a weight of 0.
    """

    blocks_N: Tensor
    places_N: Tensor
    begun: Tensor
    tiles: list[Tiles]


class FlexPages:
    """Attention of all layers for one step."""

    def __init__(self, memory: PagedMemory, groups: Sequence[PageGroup], attention: PageAttention) -> None:
        assert memory.by_head, "pages of a layer lie head by head"
        self.memory = memory
        self.groups = groups
        self._attention = attention

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """Write one layer's new keys and values, and attend, (1, H, N, V)."""
        query_BHTC, key_BKTC, value_BKTV, _, scores, _ = inputs
        index = self.memory.group_of[layer]
        group, window = self.groups[index], self.memory.groups[index].window
        self.memory.clear(layer, group.begun)
        self.memory.write(layer, group.blocks_N, group.places_N, key_BKTC[0].transpose(0, 1), value_BKTV[0].transpose(0, 1))
        pages, query_NHC = self.memory.layers[layer], query_BHTC[0].transpose(0, 1)
        attended_NHV = query_NHC.new_empty((*query_NHC.shape[:2], value_BKTV.shape[-1]))
        for rows_BT, real_R, places_R, mask in group.tiles:
            queries_BHTC = query_NHC[:, :, None] if rows_BT is None else query_NHC[rows_BT].transpose(1, 2)
            attended_BHTV = self._attention(queries_BHTC, pages.keys, pages.values, mask, scores, window, self.memory.slopes_H)
            if real_R is None or places_R is None:
                return attended_BHTV[:, :, 0].transpose(0, 1)[None].to(query_BHTC.dtype)
            attended_NHV[real_R] = attended_BHTV.transpose(1, 2).flatten(0, 1)[places_R].to(attended_NHV.dtype)
        return attended_NHV.transpose(0, 1)[None]


class FlexPagesAttention:
    """FlexAttention reads pages where they lie."""

    arithmetic: Sequence[str] = ("attention over KV blocks by FlexAttention",)

    def __init__(self, memory: PagedMemory, attention: PageAttention, dtype: torch.dtype) -> None:
        """dtype: the model's."""
        self._memory, self._attention, self._dtype = memory, attention, dtype

    def cache(self, batch: Batch, inputs: StepInputs) -> PagedBatch:
        if batch.seen_until():
            # its page masks are causal
            return GatheredBatch(self._memory, batch, inputs, self._dtype)
        return FlexBatch(self._memory, batch, inputs, self._attention)

    def static_pages(self, positions_B: Tensor, tables_GBW: Tensor, spare: Sequence[int]) -> FlexPages:
        """As of `StaticAttention`: one new token of each of B sequences."""
        memory, groups = self._memory, []
        for index, (group, tables_BW) in enumerate(zip(memory.groups, tables_GBW, strict=True)):
            columns_B1 = (positions_B // memory.block_size)[:, None].long()
            blocks_B = tables_BW.gather(1, columns_B1)[:, 0].long()
            places_B = (positions_B % memory.block_size).long()
            begun_B = torch.where(places_B == 0, blocks_B, spare[index])
            mask = page_mask(tables_BW, positions_B[:, None], group.window, memory.block_size, memory.pages_of(index))
            groups.append(PageGroup(blocks_B, places_B, begun_B, [Tiles(None, None, None, mask)]))
        return FlexPages(memory, groups, self._attention)


class _TileNumbers(NamedTuple):
    """`Tiles` on the host: block tables and positions in place of the mask."""

    rows_BT: Tensor
    real_R: Tensor
    places_R: Tensor
    tables_BW: Tensor
    positions_BT: Tensor


class _GroupNumbers(NamedTuple):
    """A `PageGroup` on the host."""

    blocks_N: Tensor
    places_N: Tensor
    begun: Tensor
    tiles: list[_TileNumbers]


class FlexBatch(PagedBatch):
    """A batch of any kind: its sequences in tiles of `TILES`, as many of each as the next power of two."""

    def __init__(self, memory: PagedMemory, batch: Batch, inputs: StepInputs, attention: PageAttention) -> None:
        super().__init__(memory, batch, inputs)
        self._attention = attention
        self._numbers = [_numbers(memory, batch, inputs, index) for index in range(len(memory.groups))]
        self._pages = FlexPages(memory, [], attention)

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        groups = [_group(self.memory, numbers, index) for index, numbers in enumerate(self._numbers)]
        self._pages = FlexPages(self.memory, groups, self._attention)
        return super().extend(count, real)

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        return self._pages.attend(layer, inputs)


def _group(memory: PagedMemory, numbers: _GroupNumbers, index: int) -> PageGroup:
    """Masks of a group, computed on the device once its numbers have arrived."""
    window, size, pages = memory.groups[index].window, memory.block_size, memory.pages_of(index)
    tiles = [
        Tiles(rows_BT, real_R, places_R, page_mask(tables_BW, positions_BT, window, size, pages))
        for rows_BT, real_R, places_R, tables_BW, positions_BT in numbers.tiles
    ]
    return PageGroup(numbers.blocks_N, numbers.places_N, numbers.begun, tiles)


def _numbers(memory: PagedMemory, batch: Batch, inputs: StepInputs, index: int) -> _GroupNumbers:
    blocks, places = batch.written(index, memory.block_size)
    begun = [block for block, place in zip(blocks, places, strict=True) if place == 0]
    members: dict[int, list[int]] = {}
    for sequence in range(batch.sequences):
        count = batch.starts[sequence + 1] - batch.starts[sequence]
        members.setdefault(next((tile for tile in TILES if count <= tile), TILES[-1]), []).append(sequence)
    tiles = [_tiles(memory, batch, inputs, index, tile, sequences) for tile, sequences in members.items()]
    return _GroupNumbers(inputs.put(blocks), inputs.put(places), inputs.put(begun), tiles)


def _tiles(
    memory: PagedMemory, batch: Batch, inputs: StepInputs, index: int, tile: int, sequences: Sequence[int]
) -> _TileNumbers:
    """Sequences cut into tiles of one size; padding repeats a tile's last token, and tiles of padding attend to nothing."""
    pieces = [
        (sequence, start, min(start + tile, batch.starts[sequence + 1]))
        for sequence in sequences
        for start in range(batch.starts[sequence], batch.starts[sequence + 1], tile)
    ]
    count = 1 << (len(pieces) - 1).bit_length()
    host_tables_BW, tables_BW = inputs.reserve((count, memory.table_width), torch.int32)
    host_rows_BT, rows_BT = inputs.reserve((count, tile), torch.int64)
    host_positions_BT, positions_BT = inputs.reserve((count, tile), torch.int32)
    host_tables_BW[...], host_rows_BT[...], host_positions_BT[...] = 0, 0, -1
    real: list[int] = []
    places: list[int] = []
    for place, (sequence, start, end) in enumerate(pieces):
        table = batch.tables[index][sequence][: memory.table_width]
        host_tables_BW[place, : len(table)] = table
        host_rows_BT[place], host_positions_BT[place] = end - 1, batch.positions[end - 1]
        host_rows_BT[place, : end - start] = range(start, end)
        host_positions_BT[place, : end - start] = batch.positions[start:end]
        real += range(start, end)
        places += range(place * tile, place * tile + end - start)
    return _TileNumbers(rows_BT, inputs.put(real), inputs.put(places), tables_BW, positions_BT)
