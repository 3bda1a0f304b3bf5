"""Rendering of chosen blocks: headings, lists, tables and code in Markdown, the rest as paragraphs.

Characters stay what they are. Entities are decoded; outside of code, white space of any kind becomes one space, control
characters and invisible hyphenation marks go.
"""

# ruff: noqa: SIM109 - see parsing.py

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.block_text import ENTITIES, block_lengths, put, put_block
from bessemer.data.extraction.parsing import PRE, Page
from bessemer.data.extraction.vocabulary import HEADING, NUMBER, PREFORMATTED, TRAITS
from bessemer.data.text.compiled import compiled

#: An item of a list with more blocks of its own is a container (a post of a forum), and a table with a cell longer than this
#: is a layout.
_BLOCKS_OF_ITEM, _CHARACTERS_OF_CELL = 6, 600
_LI, _OL, _DT, _DD, _TD, _TH, _TR, _TABLE, _H1 = (NUMBER[n] for n in ("li", "ol", "dt", "dd", "td", "th", "tr", "table", "h1"))
_NEWLINE, _SPACE, _HASH, _MINUS, _DOT, _BAR, _BACKTICK = b"\n #-.|`"
_LISTS = np.zeros(len(TRAITS), np.bool_)
_LISTS[[NUMBER[name] for name in ("ul", "ol", "menu", "dir")]] = True
# Rows of the layout, of each element: its list item, how deep in lists it is, its table cell and its table (-1 where there is
# none), its number among items or cells, whether a table holds data, an item's own blocks, and scratch.
_ITEM, _DEPTH, _CELL, _TABLE_OF, _NUMBER, _IS_DATA, _OWN_BLOCKS, _CHILDREN = range(8)


@compiled
def lay_out(page: Page, sizes: np.ndarray, keep: np.ndarray, traits: np.ndarray, lists: np.ndarray, layout: np.ndarray) -> None:
    """Fills `layout`, (8, N) int32 of zeros, by one walk from the root down; see `_ITEM`, `_DEPTH`, … for its rows."""
    tags, parents, block_elements = page.tags, page.parents, page.block_elements
    item, depth, cell, table = layout[_ITEM], layout[_DEPTH], layout[_CELL], layout[_TABLE_OF]
    number, is_data, own_blocks, children = layout[_NUMBER], layout[_IS_DATA], layout[_OWN_BLOCKS], layout[_CHILDREN]
    item[0] = cell[0] = table[0] = -1
    for element in range(1, len(tags)):
        parent = parents[element]
        tag = tags[element]
        item[element] = element if tag == _LI else item[parent]
        depth[element] = min(8, depth[parent] + lists[tag])
        cell[element] = cell[parent]
        table[element] = table[parent]
        if tag == _TABLE:
            if table[parent] >= 0:
                is_data[table[parent]] = 0
            table[element] = element
            cell[element] = -1
            item[element] = -1
            depth[element] = 0
            is_data[element] = 1
        elif tag == _TD or tag == _TH:
            cell[element] = element
            item[element] = -1
            depth[element] = 0
            children[parent] += 1
            number[element] = children[parent]
        elif tag == _LI:
            children[parent] += 1
            number[element] = children[parent]
    # from here on: the characters of each cell
    children[:] = 0
    for block in range(len(block_elements)):
        element = block_elements[block]
        if not keep[block]:
            continue
        if item[element] >= 0:
            own_blocks[item[element]] += 1
        if cell[element] >= 0:
            children[cell[element]] += sizes[block]
            heads = traits[tags[element]] & HEADING and tags[element] <= _H1 + 2
            if heads or children[cell[element]] > _CHARACTERS_OF_CELL:
                is_data[table[element]] = 0


@compiled
def render_bytes(
    data: np.ndarray,
    page: Page,
    keep: np.ndarray,
    layout: np.ndarray,
    traits: np.ndarray,
    entities: tuple,
    scratch: np.ndarray,
    out: np.ndarray,
) -> int:
    """Writes the text of the kept blocks to `out` as UTF-8, and returns its size; `scratch` holds the longest block."""
    tags, parents, block_runs, block_elements = page.tags, page.parents, page.block_runs, page.block_elements
    run_flags = page.run_flags
    item, depth, cell, table = layout[_ITEM], layout[_DEPTH], layout[_CELL], layout[_TABLE_OF]
    number, is_data, own_blocks, marked = layout[_NUMBER], layout[_IS_DATA], layout[_OWN_BLOCKS], layout[_CHILDREN]
    # from here on: whether each item has its marker
    marked[:] = 0
    size = 0
    # the previous block's table, row, column, item, tag and `pre`
    last_table = last_row = last_pre = last_item = -1
    last_column = last_tag = 0
    last_cell = -1
    in_fence = False
    for block in range(len(block_elements)):
        if not keep[block]:
            continue
        element = block_elements[block]
        tag = tags[element]
        text_start, fence_before = size, in_fence
        here_table = table[element] if cell[element] >= 0 and is_data[table[element]] else -1
        pre = -1
        if run_flags[block_runs[block]] & PRE or run_flags[block_runs[block + 1] - 1] & PRE:
            pre = element
            while pre > 0 and not traits[tags[pre]] & PREFORMATTED:
                pre = parents[pre]
        here_item = item[element] if item[element] >= 0 and own_blocks[item[element]] <= _BLOCKS_OF_ITEM else -1
        first_of_item = here_item >= 0 and not marked[here_item]

        # --- what parts it from the block before
        if in_fence and pre != last_pre:
            size = _put_fence(out, put(out, size, _NEWLINE))
            in_fence = False
        row = parents[cell[element]] if here_table >= 0 else -1
        column = number[cell[element]] if here_table >= 0 else 0
        if size > 0:
            if pre >= 0 and pre == last_pre:
                size = put(out, size, _NEWLINE)
            elif here_table >= 0 and here_table == last_table:
                if row != last_row:
                    size = put(out, size, _NEWLINE)
                elif cell[element] == last_cell:
                    size = put(out, size, _SPACE)
            elif (here_item >= 0 and last_item >= 0) or (tag == _DD and last_tag == _DT) or (tag == _DT and last_tag == _DT):
                size = put(out, size, _NEWLINE)
            else:
                size = put(out, put(out, size, _NEWLINE), _NEWLINE)
        if here_table >= 0:
            skipped = column - (last_column if here_table == last_table and row == last_row else 1)
            for index in range(skipped):
                if index or (here_table == last_table and row == last_row):
                    size = put(out, size, _SPACE)
                size = put(out, put(out, size, _BAR), _SPACE)
        if here_item >= 0:
            for _ in range(depth[here_item] - 1):
                size = put(out, put(out, size, _SPACE), _SPACE)
            if first_of_item:
                marked[here_item] = 1
                if tags[parents[here_item]] == _OL:
                    size = _put_number(out, size, number[here_item])
                    size = put(out, put(out, size, _DOT), _SPACE)
                else:
                    size = put(out, put(out, size, _MINUS), _SPACE)
            else:
                size = put(out, put(out, size, _SPACE), _SPACE)
        elif traits[tag] & HEADING and here_table < 0:
            for _ in range(tag - _H1 + 1):
                size = put(out, size, _HASH)
            size = put(out, size, _SPACE)
        if pre >= 0 and here_table < 0 and not in_fence:
            size = put(out, _put_fence(out, size), _NEWLINE)
            in_fence = True

        # --- the block itself
        before = size
        size = put_block(data, page, block, scratch, entities, out, size)
        if here_table >= 0 or (traits[tag] & HEADING):
            for index in range(before, size):
                if out[index] == _NEWLINE:
                    out[index] = _SPACE
        # nothing visible: undo what was written for the block
        if size == before:
            size = text_start
            in_fence = fence_before
            if first_of_item:
                marked[here_item] = 0
            continue
        last_table, last_row, last_column, last_cell = here_table, row, column, cell[element]
        last_item, last_pre, last_tag = here_item, pre if here_table < 0 else -1, tag
    if in_fence:
        size = _put_fence(out, put(out, size, _NEWLINE))
    return size


@compiled
def _put_fence(out: np.ndarray, size: int) -> int:
    for _ in range(3):
        size = put(out, size, _BACKTICK)
    return size


@compiled
def _put_number(out: np.ndarray, size: int, number: int) -> int:
    power = 1
    while power * 10 <= number:
        power *= 10
    while power:
        size = put(out, size, 48 + (number // power) % 10)
        power //= 10
    return size


def laid_out(page: Page, keep: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Layout in lists and tables of the blocks with `keep`, (8, N) int32; `sizes`, (B,), are the blocks' characters."""
    layout = np.zeros((8, len(page.tags)), np.int32)
    lay_out(page, sizes, keep, TRAITS, _LISTS, layout)
    return layout


def table_of_blocks(layout: np.ndarray, page: Page) -> np.ndarray:
    """The table of data in whose cells each block lies, (B,), -1 where there is none."""
    element = page.block_elements
    table = layout[_TABLE_OF, element]
    return np.where((layout[_CELL, element] >= 0) & (layout[_IS_DATA, table] > 0), table, -1)


def render(data: np.ndarray, page: Page, keep: np.ndarray, sizes: np.ndarray) -> str:
    """The text of the blocks with `keep`, (B,) bool; `sizes`, (B,), are their characters."""
    lengths = block_lengths(page)
    layout = laid_out(page, keep, sizes)
    scratch = np.empty(2 * int(lengths.max(initial=0)) + 64, np.uint8)
    # around a block: at most two newlines, eight levels of indentation, a marker and fences, and `| ` for each cell
    out = np.empty(2 * int(lengths[keep].sum()) + 64 * int(keep.sum()) + 3 * len(page.tags) + 64, np.uint8)
    size = render_bytes(data, page, keep, layout, TRAITS, ENTITIES, scratch, out)
    return out[:size].tobytes().decode("utf-8")
