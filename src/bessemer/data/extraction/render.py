"""Rendering of chosen blocks: headings, lists, tables and code in Markdown, the rest as paragraphs.

Characters stay what they are. Entities are decoded; outside of code, white space of any kind becomes one space, control
characters and invisible hyphenation marks go.
"""

# ruff: noqa: SIM109 - see parsing.py

from __future__ import annotations

from html.entities import html5

import numpy as np

from bessemer.data.extraction.parsing import BREAK, PRE, Page
from bessemer.data.extraction.tags import HEADING, NUMBER, PREFORMATTED, TRAITS
from bessemer.data.extraction.vocabulary import PREFIX, WORD, hash_table
from bessemer.data.text.compiled import compiled

#: An item of a list with more blocks of its own is a container (a post of a forum), and a table with a cell longer than this
#: is a layout.
_BLOCKS_OF_ITEM, _CHARACTERS_OF_CELL = 6, 600
_LI, _OL, _DT, _DD, _TD, _TH, _TR, _TABLE, _H1 = (NUMBER[n] for n in ("li", "ol", "dt", "dd", "td", "th", "tr", "table", "h1"))
_LISTS = np.zeros(len(TRAITS), np.bool_)
_LISTS[[NUMBER[name] for name in ("ul", "ol", "menu", "dir")]] = True
# Rows of the layout, of each element: its list item, how deep in lists it is, its table cell and its table (-1 where there is
# none), its number among items or cells, whether a table holds data, an item's own blocks, and scratch.
_ITEM, _DEPTH, _CELL, _TABLE_OF, _NUMBER, _IS_DATA, _OWN_BLOCKS, _CHILDREN = range(8)
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def _entity_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Names of entities by hash (those that need no semicolon match as prefixes), and their UTF-8 with offsets."""
    texts = sorted(set(html5.values()))
    number = {text: place + 1 for place, text in enumerate(texts)}
    entries: dict[tuple[str, int], int] = {}
    for name, text in html5.items():
        entries[name.rstrip(";"), WORD if name.endswith(";") else PREFIX] = number[text]
    keys, values = hash_table(entries)
    encoded = [text.encode() for text in texts]
    offsets = np.concatenate([[0, 0], np.cumsum([len(text) for text in encoded])]).astype(np.int64)
    return keys, values, np.frombuffer(b"".join(encoded), np.uint8), offsets


ENTITY_KEYS, ENTITY_VALUES, ENTITY_BYTES, ENTITY_OFFSETS = _entity_tables()
#: What the numbers 128 to 159 mean in pages: bytes of windows-1252 (HTML, 13.2.5.80).
_WINDOWS_1252 = np.array(
    [ord(bytes([byte]).decode("cp1252", "ignore") or chr(byte)) for byte in range(128, 160)], np.int64
)  # fmt: skip
_REPLACEMENT = 0xFFFD


@compiled
def _put_codepoint(out: np.ndarray, size: int, code: int) -> int:
    if code < 0x80:
        out[size] = code
        return size + 1
    if code < 0x800:
        out[size] = 0xC0 | (code >> 6)
        out[size + 1] = 0x80 | (code & 63)
        return size + 2
    if code < 0x10000:
        out[size] = 0xE0 | (code >> 12)
        out[size + 1] = 0x80 | ((code >> 6) & 63)
        out[size + 2] = 0x80 | (code & 63)
        return size + 3
    out[size] = 0xF0 | (code >> 18)
    out[size + 1] = 0x80 | ((code >> 12) & 63)
    out[size + 2] = 0x80 | ((code >> 6) & 63)
    out[size + 3] = 0x80 | (code & 63)
    return size + 4


@compiled
def decode_entities(data: np.ndarray, start: int, end: int, out: np.ndarray, size: int, entities: tuple) -> int:
    """Copies `data[start:end]` to `out` with entities decoded, as browsers do it; the new size of `out`."""
    keys, values, texts, offsets, windows = entities
    mask = np.uint64(len(keys) - 1)
    place = start
    while place < end:
        byte = data[place]
        if byte != 38:
            out[size] = byte
            size += 1
            place += 1
            continue
        look = place + 1
        if look < end and data[look] == 35:
            look += 1
            code = 0
            digits = 0
            if look < end and (data[look] == 120 or data[look] == 88):
                look += 1
                while look < end:
                    digit = data[look]
                    if 48 <= digit <= 57:
                        value = digit - 48
                    elif 97 <= (digit | 32) <= 102:
                        value = (digit | 32) - 87
                    else:
                        break
                    code = min(code * 16 + value, 0x110000)
                    digits += 1
                    look += 1
            else:
                while look < end and 48 <= data[look] <= 57:
                    code = min(code * 10 + (data[look] - 48), 0x110000)
                    digits += 1
                    look += 1
            if digits:
                if look < end and data[look] == 59:
                    look += 1
                if code == 0 or code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                    code = _REPLACEMENT
                elif 128 <= code < 160:
                    code = windows[code - 128]
                size = _put_codepoint(out, size, code)
                place = look
                continue
        else:
            state = _FNV_START
            found = 0
            after = place
            while look < end and look - place <= 32:
                letter = data[look]
                if not (48 <= letter <= 57 or 97 <= (letter | 32) <= 122):
                    break
                state = (state ^ np.uint64(letter)) * _FNV_PRIME
                look += 1
                closed = look < end and data[look] == 59
                slot = state & mask
                while keys[slot] != 0:
                    if keys[slot] == state:
                        if closed and values[slot, 0]:
                            found = values[slot, 0]
                            after = look + 1
                        elif values[slot, 1]:
                            found = values[slot, 1]
                            after = look
                        break
                    slot = (slot + np.uint64(1)) & mask
            if found:
                for index in range(offsets[found], offsets[found + 1]):
                    out[size] = texts[index]
                    size += 1
                place = after
                continue
        out[size] = 38
        size += 1
        place += 1
    return size


@compiled
def collapse(text: np.ndarray, end: int, out: np.ndarray, size: int) -> int:
    """Copies `text[:end]` to `out` with white space as single spaces and none at the start of a line.

    A newline in `text` is one that shall stay. Returns the new size of `out`.
    """
    place = 0
    space = True
    while place < end:
        byte = text[place]
        if byte == 10:
            if size > 0 and out[size - 1] == 32:
                size -= 1
            out[size] = 10
            size += 1
            space = True
            place += 1
            continue
        blank = byte == 32
        width = 1
        drop = byte < 32 or byte == 127
        if byte == 9 or byte == 12 or byte == 13:
            blank, drop = True, False
        elif byte == 0xC2 and place + 1 < end:
            second = text[place + 1]
            width = 2
            blank = second == 0xA0 or second == 0x85
            drop = second == 0xAD or (0x80 <= second < 0xA0 and not blank)
        elif byte == 0xE2 and place + 2 < end:
            second, third = text[place + 1], text[place + 2]
            width = 3
            if second == 0x80:
                blank = 0x80 <= third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF
                drop = third == 0x8B
            elif second == 0x81:
                blank = third == 0x9F
                drop = third == 0xA0
        elif byte == 0xE3 and place + 2 < end and text[place + 1] == 0x80 and text[place + 2] == 0x80:
            width = 3
            blank = True
        elif byte == 0xEF and place + 2 < end and text[place + 1] == 0xBB and text[place + 2] == 0xBF:
            width = 3
            drop = True
        if blank:
            if not space:
                out[size] = 32
                size += 1
            space = True
        elif not drop:
            for index in range(width):
                out[size] = text[place + index]
                size += 1
            space = False
        place += width
    return size


@compiled
def _trim(out: np.ndarray, start: int, size: int) -> int:
    """Takes white space off the end of `out[start:size]`, and blank lines off its beginning."""
    while size > start and (out[size - 1] == 10 or out[size - 1] == 32 or out[size - 1] == 9):
        size -= 1
    first = place = start
    while place < size and (out[place] == 10 or out[place] == 32 or out[place] == 9):
        place += 1
        if out[place - 1] == 10:
            first = place
    if first > start:
        for index in range(first, size):
            out[start + index - first] = out[index]
        size -= first - start
    return size


@compiled
def put_block(
    data: np.ndarray,
    first: int,
    last: int,
    run_starts: np.ndarray,
    run_ends: np.ndarray,
    run_flags: np.ndarray,
    scratch: np.ndarray,
    entities: tuple,
    out: np.ndarray,
    size: int,
) -> int:
    """Appends the text of the runs `first` to `last` to `out`; the size is the same as before where none of it is visible."""
    used = 0
    verbatim = False
    for run in range(first, last):
        verbatim = verbatim or run_flags[run] & PRE != 0
    for run in range(first, last):
        if run_flags[run] & BREAK:
            scratch[used] = 10
            used += 1
            continue
        before = used
        used = decode_entities(data, run_starts[run], run_ends[run], scratch, used, entities)
        if not verbatim:
            for index in range(before, used):
                if scratch[index] == 10:
                    scratch[index] = 32
    start = size
    if not verbatim:
        return _trim(out, start, collapse(scratch, used, out, size))
    for index in range(used):
        byte = scratch[index]
        if byte == 13:
            if index + 1 < used and scratch[index + 1] == 10:
                continue
            byte = np.uint8(10)
        if byte >= 32 or byte == 10 or byte == 9:
            out[size] = byte
            size += 1
    return _trim(out, start, size)


@compiled
def lay_out(
    tags: np.ndarray,
    parents: np.ndarray,
    block_elements: np.ndarray,
    sizes: np.ndarray,
    keep: np.ndarray,
    traits: np.ndarray,
    lists: np.ndarray,
    layout: np.ndarray,
) -> None:
    """Fills `layout`, (8, N) int32 of zeros, by one walk from the root down; see `_ITEM`, `_DEPTH`, … for its rows."""
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
    # from here on the characters of a cell
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
    tags: np.ndarray,
    parents: np.ndarray,
    runs: tuple,
    block_runs: np.ndarray,
    block_elements: np.ndarray,
    keep: np.ndarray,
    layout: np.ndarray,
    traits: np.ndarray,
    entities: tuple,
    scratch: np.ndarray,
    out: np.ndarray,
) -> int:
    """Writes the text of the kept blocks to `out` as UTF-8, and returns its size; `scratch` holds the longest block."""
    run_starts, run_ends, run_flags = runs
    item, depth, cell, table = layout[_ITEM], layout[_DEPTH], layout[_CELL], layout[_TABLE_OF]
    number, is_data, own_blocks, marked = layout[_NUMBER], layout[_IS_DATA], layout[_OWN_BLOCKS], layout[_CHILDREN]
    # from here on whether an item has its marker
    marked[:] = 0
    size = 0
    # of the block before: its table, row and column, its item, its element, its pre
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
            size = _put_text(out, size, 10, 96, 96, 96)
            in_fence = False
        row = parents[cell[element]] if here_table >= 0 else -1
        column = number[cell[element]] if here_table >= 0 else 0
        if size > 0:
            if pre >= 0 and pre == last_pre:
                out[size] = 10
                size += 1
            elif here_table >= 0 and here_table == last_table:
                if row != last_row:
                    out[size] = 10
                    size += 1
                elif cell[element] == last_cell:
                    out[size] = 32
                    size += 1
            elif (here_item >= 0 and last_item >= 0) or (tag == _DD and last_tag == _DT) or (tag == _DT and last_tag == _DT):
                out[size] = 10
                size += 1
            else:
                out[size] = 10
                out[size + 1] = 10
                size += 2
        if here_table >= 0:
            skipped = column - (last_column if here_table == last_table and row == last_row else 1)
            for index in range(skipped):
                if index or (here_table == last_table and row == last_row):
                    out[size] = 32
                    size += 1
                out[size] = 124
                out[size + 1] = 32
                size += 2
        if here_item >= 0:
            for _ in range(depth[here_item] - 1):
                out[size] = 32
                out[size + 1] = 32
                size += 2
            if first_of_item:
                marked[here_item] = 1
                if tags[parents[here_item]] == _OL:
                    size = _put_number(out, size, number[here_item])
                    out[size] = 46
                    out[size + 1] = 32
                    size += 2
                else:
                    out[size] = 45
                    out[size + 1] = 32
                    size += 2
            else:
                out[size] = 32
                out[size + 1] = 32
                size += 2
        elif traits[tag] & HEADING and here_table < 0:
            for _ in range(tag - _H1 + 1):
                out[size] = 35
                size += 1
            out[size] = 32
            size += 1
        if pre >= 0 and here_table < 0 and not in_fence:
            size = _put_text(out, size, 96, 96, 96, 10)
            in_fence = True

        # --- the block itself
        before = size
        first, last = int(block_runs[block]), int(block_runs[block + 1])
        size = put_block(data, first, last, run_starts, run_ends, run_flags, scratch, entities, out, size)
        if here_table >= 0 or (traits[tag] & HEADING):
            for index in range(before, size):
                if out[index] == 10:
                    out[index] = 32
        # nothing visible: as if it were not there
        if size == before:
            size = text_start
            in_fence = fence_before
            if first_of_item:
                marked[here_item] = 0
            continue
        last_table, last_row, last_column, last_cell = here_table, row, column, cell[element]
        last_item, last_pre, last_tag = here_item, pre if here_table < 0 else -1, tag
    if in_fence:
        size = _put_text(out, size, 10, 96, 96, 96)
    return size


@compiled
def _put_text(out: np.ndarray, size: int, first: int, second: int, third: int, fourth: int) -> int:
    out[size] = first
    out[size + 1] = second
    out[size + 2] = third
    out[size + 3] = fourth
    return size + 4


@compiled
def _put_number(out: np.ndarray, size: int, number: int) -> int:
    power = 1
    while power * 10 <= number:
        power *= 10
    while power:
        out[size] = 48 + (number // power) % 10
        size += 1
        power //= 10
    return size


_ENTITIES = (ENTITY_KEYS, ENTITY_VALUES, ENTITY_BYTES, ENTITY_OFFSETS, _WINDOWS_1252)


def laid_out(page: Page, keep: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How the blocks with `keep` lie in lists and tables, (8, N) int32; `sizes`, (B,), are the blocks' characters."""
    layout = np.zeros((8, len(page.tags)), np.int32)
    lay_out(page.tags, page.parents, page.block_elements, sizes, keep, TRAITS, _LISTS, layout)
    return layout


def table_of_blocks(layout: np.ndarray, page: Page) -> np.ndarray:
    """The table of data in whose cells each block lies, (B,), -1 where there is none."""
    element = page.block_elements
    table = layout[_TABLE_OF, element]
    return np.where((layout[_CELL, element] >= 0) & (layout[_IS_DATA, table] > 0), table, -1)


def render(data: np.ndarray, page: Page, keep: np.ndarray, sizes: np.ndarray) -> str:
    """The text of the blocks with `keep`, (B,) bool; `sizes`, (B,), are their characters."""
    lengths = _lengths(page)
    layout = laid_out(page, keep, sizes)
    scratch = np.empty(2 * int(lengths.max(initial=0)) + 64, np.uint8)
    # what stands around a block is at most two newlines, eight levels, a marker and fences; and `| ` for each cell
    out = np.empty(2 * int(lengths[keep].sum()) + 64 * int(keep.sum()) + 3 * len(page.tags) + 64, np.uint8)
    runs = (page.run_starts, page.run_ends, page.run_flags)
    size = render_bytes(
        data, page.tags, page.parents, runs, page.block_runs, page.block_elements, keep, layout, TRAITS, _ENTITIES, scratch, out
    )  # fmt: skip
    return out[:size].tobytes().decode("utf-8")


def block_text(data: np.ndarray, page: Page, block: int) -> str:
    """One block's text, without markers."""
    capacity = 2 * int(_lengths(page)[block]) + 64
    scratch, out = np.empty(capacity, np.uint8), np.empty(capacity, np.uint8)
    first, last = int(page.block_runs[block]), int(page.block_runs[block + 1])
    size = put_block(data, first, last, page.run_starts, page.run_ends, page.run_flags, scratch, _ENTITIES, out, 0)
    return out[:size].tobytes().decode("utf-8")


def _lengths(page: Page) -> np.ndarray:
    """The bytes of each block with its line breaks, (B,) int64."""
    ends = np.concatenate([[0], np.cumsum(page.run_ends - page.run_starts + 1)])
    return ends[page.block_runs[1:]] - ends[page.block_runs[:-1]]
