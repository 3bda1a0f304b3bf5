"""The text of one block, in compiled loops: entities decoded, white space collapsed, invisible characters left out."""

from __future__ import annotations

from html.entities import html5

import numpy as np

from bessemer.data.extraction.attributes import FNV_PRIME, FNV_START
from bessemer.data.extraction.parsing import BREAK, PRE, Page
from bessemer.data.extraction.vocabulary import PREFIX, WORD, hash_table
from bessemer.data.text.compiled import compiled


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
def put(out: np.ndarray, size: int, byte: int) -> int:
    """Appends a byte to `out`; the new size."""
    out[size] = byte
    return size + 1


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
            size = put(out, size, byte)
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
            state = FNV_START
            entity = 0
            after = place
            while look < end and look - place <= 32:
                letter = data[look]
                if not (48 <= letter <= 57 or 97 <= (letter | 32) <= 122):
                    break
                state = (state ^ np.uint64(letter)) * FNV_PRIME
                look += 1
                closed = look < end and data[look] == 59
                slot = state & mask
                while keys[slot] != 0:
                    if keys[slot] == state:
                        if closed and values[slot, 0]:
                            entity = values[slot, 0]
                            after = look + 1
                        elif values[slot, 1]:
                            entity = values[slot, 1]
                            after = look
                        break
                    slot = (slot + np.uint64(1)) & mask
            if entity:
                for index in range(offsets[entity], offsets[entity + 1]):
                    size = put(out, size, texts[index])
                place = after
                continue
        size = put(out, size, 38)
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
            size = put(out, size, 10)
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
                size = put(out, size, 32)
            space = True
        elif not drop:
            for index in range(width):
                size = put(out, size, text[place + index])
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
    data: np.ndarray, page: Page, block: int, scratch: np.ndarray, entities: tuple, out: np.ndarray, size: int
) -> int:
    """Appends a block's text to `out`; returns the new size, which is the old one where nothing in the block is visible."""
    run_starts, run_ends, run_flags = page.run_starts, page.run_ends, page.run_flags
    first, last = page.block_runs[block], page.block_runs[block + 1]
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
            size = put(out, size, byte)
    return _trim(out, start, size)


ENTITIES = (ENTITY_KEYS, ENTITY_VALUES, ENTITY_BYTES, ENTITY_OFFSETS, _WINDOWS_1252)


def block_text(data: np.ndarray, page: Page, block: int) -> str:
    """One block's text, without markers."""
    capacity = 2 * int(block_lengths(page)[block]) + 64
    scratch, out = np.empty(capacity, np.uint8), np.empty(capacity, np.uint8)
    size = put_block(data, page, block, scratch, ENTITIES, out, 0)
    return out[:size].tobytes().decode("utf-8")


def block_lengths(page: Page) -> np.ndarray:
    """The bytes of each block with its line breaks, (B,) int64."""
    ends = np.concatenate([[0], np.cumsum(page.run_ends - page.run_starts + 1)])
    return ends[page.block_runs[1:]] - ends[page.block_runs[:-1]]
