"""HTML parser: bytes of a page to its elements and runs of text, in one pass of compiled code.

The parser follows HTML's rules where they decide which text belongs where: void and raw elements, implied end tags, end tags
that match nothing, tables as walls. It keeps no attributes, only the roles that their words stand for (`vocabulary.py`).
Every search for an open element is a look-up (`last_open`, and per level the nearest wall, list and table), the depth is
bounded, and each byte is read a bounded number of times, so that the time is linear in the page whatever is in it.
"""

# ruff: noqa: SIM109, SIM110 - the compiler makes jumps of comparisons, and a tuple of `in`

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bessemer.data.extraction.attributes import (
    HREF,
    OG_TITLE,
    SELF_CLOSING,
    UNSEEN,
    is_letter,
    is_space,
    lower,
    read_attributes,
)
from bessemer.data.extraction.vocabulary import (
    BLOCK,
    DROPPED,
    ENDS_P,
    HEADING,
    LIST,
    NUMBER,
    PREFORMATTED,
    RAW,
    ROLE_BIT,
    ROLE_BITS,
    ROLE_KEYS,
    TABLE_PART,
    TAG_KEYS,
    TAG_NUMBERS,
    TRAITS,
    VOID,
    WALL,
)
from bessemer.data.text.compiled import compiled

#: Most elements open at once; deeper ones count as part of the deepest.
MAX_DEPTH = 512
#: Tags read of one page: what follows is not read. A page of 50 MB of nothing but tags would fill gigabytes otherwise.
MAX_TAGS = 1_000_000

# Bits of a run.
LINK, PRE, CODE, BREAK = 1, 2, 4, 8

_A, _P, _LI, _DT, _DD, _BR, _HR = (NUMBER[n] for n in ("a", "p", "li", "dt", "dd", "br", "hr"))
_TR, _TD, _TH, _TABLE, _OPTION = (NUMBER[n] for n in ("tr", "td", "th", "table", "option"))
_THEAD, _TBODY, _TFOOT, _CODE, _BODY, _HTML = (NUMBER[n] for n in ("thead", "tbody", "tfoot", "code", "body", "html"))
_HEAD, _TITLE, _META, _H1, _H6, _MAIN, _ARTICLE = (NUMBER[n] for n in ("head", "title", "meta", "h1", "h6", "main", "article"))
_IMG, _VIDEO, _AUDIO, _IFRAME = (NUMBER[n] for n in ("img", "video", "audio", "iframe"))
_HIDDEN = ROLE_BIT["hidden"]
# Of each level of the stack: the element, its tag, the level where its tag was open before, and the innermost wall, list, table
# and block at or below it.
_ELEMENT, _TAG, _SAME, _WALL, _LIST_LEVEL, _TABLE_LEVEL, _BLOCK_LEVEL = range(7)
# Rows of `inside`: what the parser is in the middle of.
_LINKING, _DROPPING, _PREFORMATTING, _CODING = range(4)


class Page(NamedTuple):
    """A parsed page. N elements in document order, R runs of text, B blocks.

    Elements: `tags`, `parents` (-1 for the root), `depths`, `ends` (one past the last descendant), `roles` of the element
    itself, all (N,). Element 0 is the root, whose roles are those of the page as a whole.
    Runs: `[start, end)` in the bytes, the innermost `element`, and `flags`, all (R,).
    Blocks: the first run of each, (B + 1,), the innermost block-level element where it begins, and how many images, players
    and frames stand between it and the block before, both (B,).
    `title` and `og_title` are [start, end) in the bytes, empty where absent.
    """

    tags: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    roles: np.ndarray
    run_starts: np.ndarray
    run_ends: np.ndarray
    run_elements: np.ndarray
    run_flags: np.ndarray
    block_runs: np.ndarray
    block_elements: np.ndarray
    block_media: np.ndarray
    title: np.ndarray


@compiled
def _is_blank(data: np.ndarray, start: int, end: int, flags: int) -> bool:
    """Whether a run is white space and no line break."""
    if flags & BREAK:
        return False
    for place in range(start, end):
        if not is_space(data[place]):
            return False
    return True


@compiled
def _pack_name(data: np.ndarray, place: int, end: int) -> tuple[int, int]:
    """The packed name that begins at `place` (`tags.pack`; 0 when too long) and where it ends."""
    packed = 0
    length = 0
    while place < end:
        byte = lower(data[place])
        if is_space(byte) or byte == 47 or byte == 62:
            break
        if 97 <= byte <= 122:
            packed = packed * 37 + (byte - 96)
        elif 48 <= byte <= 57:
            packed = packed * 37 + (byte - 48 + 27)
        else:
            length = 13
        length += 1
        if length > 12:
            packed = 0
        place += 1
    return (packed if length <= 12 else 0), place


@compiled
def _tag_number(packed: int, keys: np.ndarray, numbers: np.ndarray) -> int:
    slot = (packed ^ (packed >> 9) ^ (packed >> 23)) & 511
    while keys[slot] != 0:
        if keys[slot] == packed:
            return numbers[slot]
        slot = (slot + 1) & 511
    return 0


@compiled
def _skip_tag(data: np.ndarray, place: int, end: int) -> int:
    """One past the `>` that ends a tag without attributes of interest; quotes hide it."""
    quote = 0
    after_equals = False
    while place < end:
        byte = data[place]
        if quote:
            if byte == quote:
                quote = 0
        elif byte == 62:
            return place + 1
        elif after_equals and (byte == 34 or byte == 39):
            quote = byte
        if not is_space(byte):
            after_equals = byte == 61
        place += 1
    return end


@compiled
def _find_end_of_raw(data: np.ndarray, place: int, end: int, name_start: int, name_end: int) -> int:
    """Where the end tag of a raw element begins, or the end of the page."""
    length = name_end - name_start
    while place < end:
        if data[place] == 60 and place + 2 + length <= end and data[place + 1] == 47:
            same = True
            for index in range(length):
                if lower(data[place + 2 + index]) != lower(data[name_start + index]):
                    same = False
                    break
            if same:
                after = place + 2 + length
                if after >= end or is_space(data[after]) or data[after] == 47 or data[after] == 62:
                    return place
        place += 1
    return end


@compiled
def _skip_declaration(data: np.ndarray, place: int, end: int) -> int:
    """One past a comment, doctype, CDATA section or processing instruction that begins at `place`."""
    if place + 3 < end and data[place + 1] == 33 and data[place + 2] == 45 and data[place + 3] == 45:
        place += 4
        # <!-->
        if place < end and data[place] == 62:
            return place + 1
        # <!--->
        if place + 1 < end and data[place] == 45 and data[place + 1] == 62:
            return place + 2
        while place < end:
            if data[place] == 62 and data[place - 1] == 45 and data[place - 2] == 45:
                return place + 1
            if data[place] == 62 and data[place - 1] == 33 and data[place - 2] == 45 and data[place - 3] == 45:
                return place + 1
            place += 1
        return end
    while place < end and data[place] != 62:
        place += 1
    return min(place + 1, end)


@compiled
def _close(
    target: int, level: int, elements: int, ends: np.ndarray, stack: np.ndarray, last_open: np.ndarray, inside: np.ndarray
) -> int:
    """Closes what is open from `target` up, and returns the level below it."""
    while level >= target:
        ends[stack[_ELEMENT, level]] = elements
        last_open[stack[_TAG, level]] = stack[_SAME, level]
        level -= 1
    for what in range(4):
        if inside[what] > level:
            inside[what] = 0
    return level


@compiled
def _closed_by_end(tag: int, trait: int, level: int, stack: np.ndarray, last_open: np.ndarray) -> int:
    """The level that an end tag closes, 0 for none."""
    target = last_open[tag]
    # the end tag of any heading ends the open one
    if trait & HEADING:
        for heading in range(_H1, _H6 + 1):
            target = max(target, last_open[heading])
    if trait & VOID or tag == 0:
        return 0
    if trait & TABLE_PART:
        return target if tag == _TABLE or target >= stack[_TABLE_LEVEL, level] else 0
    # closes what is left open inside as well, else what follows would be dropped
    if trait & DROPPED:
        return target
    if tag == _LI and target < stack[_LIST_LEVEL, level]:
        return 0
    if target < stack[_WALL, level] or (not trait & BLOCK and target < stack[_BLOCK_LEVEL, level]):
        return 0
    return target


@compiled
def _closed_by_start(
    tag: int, trait: int, level: int, stack: np.ndarray, last_open: np.ndarray, traits: np.ndarray, linked: int
) -> int:
    """The level of the outermost element that a start tag ends, 0 for none."""
    table = stack[_TABLE_LEVEL, level]
    target = 0
    if trait & ENDS_P and last_open[_P] > stack[_WALL, level]:
        target = last_open[_P]
    other = 0
    floor = table
    if tag == _LI:
        other, floor = last_open[_LI], stack[_LIST_LEVEL, level]
    elif tag == _DT or tag == _DD:
        other, floor = max(last_open[_DT], last_open[_DD]), stack[_LIST_LEVEL, level]
    elif tag == _TD or tag == _TH:
        other = max(last_open[_TD], last_open[_TH])
        floor = max(floor, last_open[_TR])
    elif tag == _TR:
        other = last_open[_TR]
    elif tag == _THEAD or tag == _TBODY or tag == _TFOOT:
        other = max(last_open[_THEAD], max(last_open[_TBODY], last_open[_TFOOT]))
    elif tag == _A:
        other, floor = (last_open[_A] if linked else 0), stack[_BLOCK_LEVEL, level]
    elif tag == _OPTION or trait & HEADING:
        same = traits[stack[_TAG, level]] & HEADING if trait & HEADING else stack[_TAG, level] == _OPTION
        other, floor = (level if same else 0), 0
    if other > floor:
        target = other if target == 0 else min(target, other)
    return target


@compiled
def parse_bytes(
    data: np.ndarray,
    keep_hidden: bool,
    max_tags: int,
    elements_out: tuple,
    runs_out: tuple,
    blocks_out: tuple,
    title: np.ndarray,
    stack: np.ndarray,
    last_open: np.ndarray,
    inside: np.ndarray,
    tables: tuple,
) -> tuple[int, int, int]:
    """Fills the arrays of `Page` from the UTF-8 bytes `data`; returns how many elements, runs and blocks there are.

    `stack`, (7, depth + 1), holds of each level what `_ELEMENT`, `_TAG`, … name; `last_open`, (tags,), the innermost level
    where a tag is open; `inside`, (4,), the outermost level of a link, of what is dropped, of preformatted text and of code.
    """
    tags, parents, depths, ends, roles = elements_out
    run_starts, run_ends, run_elements, run_flags = runs_out
    block_runs, block_elements, block_media = blocks_out
    traits, tag_keys, tag_numbers, role_keys, role_bits = tables
    end = len(data)
    max_depth = stack.shape[1] - 1
    elements, runs, blocks = 1, 0, 0
    tags[0], parents[0], depths[0], roles[0] = 0, -1, 0, 0
    level = overflow = read = media = 0
    in_block = False
    place = 0
    while place < end and read < max_tags:
        # --- text up to the next markup
        start = place
        visible = False
        while place < end:
            byte = data[place]
            if byte == 60:
                following = data[place + 1] if place + 1 < end else 0
                if is_letter(following) or following == 47 or following == 33 or following == 63:
                    break
                visible = True
            elif not is_space(byte) and byte != 0:
                visible = True
            place += 1
        if place > start and not inside[_DROPPING] and (visible or in_block):
            if not in_block:
                block_runs[blocks] = runs
                block_elements[blocks] = stack[_ELEMENT, stack[_BLOCK_LEVEL, level]]
                block_media[blocks] = media
                media = 0
                blocks += 1
                in_block = True
            run_starts[runs], run_ends[runs], run_elements[runs] = start, place, stack[_ELEMENT, level]
            flags = LINK if inside[_LINKING] else 0
            if inside[_PREFORMATTING]:
                flags |= PRE
            elif inside[_CODING]:
                flags |= CODE
            run_flags[runs] = flags
            runs += 1
        if place >= end:
            break
        read += 1

        # --- what kind of markup it is
        following = data[place + 1] if place + 1 < end else 0
        closing = following == 47
        after = data[place + 2] if place + 2 < end else 0
        if following == 33 or following == 63 or (closing and not is_letter(after)):
            place = _skip_declaration(data, place, end)
            continue
        name_start = place + 2 if closing else place + 1
        packed, name_end = _pack_name(data, name_start, end)
        tag = _tag_number(packed, tag_keys, tag_numbers)
        trait = traits[tag]
        whole_page = tag == _BODY or tag == _HTML or tag == _HEAD

        if closing:
            place = _skip_tag(data, name_end, end)
            if trait & BLOCK or whole_page or tag == _BR:
                in_block = False
            if whole_page or tag == _BR:
                continue
            if overflow > 0:
                overflow -= 1
                continue
            if tag == _A:
                inside[_LINKING] = 0
            target = _closed_by_end(tag, trait, level, stack, last_open)
            if target > 0:
                level = _close(target, level, elements, ends, stack, last_open, inside)
            continue

        place, role, marks = read_attributes(data, name_end, end, tag, role_keys, role_bits, title[4:])
        media += tag == _IMG or tag == _VIDEO or tag == _AUDIO or tag == _IFRAME
        if trait & RAW:
            stop = _find_end_of_raw(data, place, end, name_start, name_end)
            if tag == _TITLE and title[1] == 0:
                title[0], title[1] = place, stop
            place = _skip_tag(data, stop, end)
            continue
        if trait & VOID or (tag == 0 and marks & SELF_CLOSING):
            if tag == _META and marks & OG_TITLE and title[3] == 0:
                title[2], title[3] = title[4], title[5]
            elif tag == _HR:
                in_block = False
            elif tag == _BR and in_block and not inside[_DROPPING]:
                # a second line break in a row ends the block
                last = runs - 1
                while last > block_runs[blocks - 1] and _is_blank(data, run_starts[last], run_ends[last], run_flags[last]):
                    last -= 1
                if run_flags[last] & BREAK and not inside[_PREFORMATTING]:
                    in_block = False
                else:
                    run_starts[runs] = run_ends[runs] = place
                    run_elements[runs] = stack[_ELEMENT, level]
                    run_flags[runs] = BREAK | (PRE if inside[_PREFORMATTING] else 0)
                    runs += 1
            continue
        if trait & BLOCK or whole_page:
            in_block = False
        # roles of the whole page, but `hidden`: many pages hide themselves until a script has run
        if whole_page:
            roles[0] |= role & ~_HIDDEN
            continue
        if overflow > 0 or level >= max_depth:
            overflow += 1
            continue

        # --- what it ends, and the element itself
        target = _closed_by_start(tag, trait, level, stack, last_open, traits, inside[_LINKING])
        if target > 0:
            level = _close(target, level, elements, ends, stack, last_open, inside)
        # an article that its class hides is shown by a script
        if tag == _MAIN or tag == _ARTICLE:
            role &= ~_HIDDEN
        if marks & UNSEEN:
            role |= _HIDDEN
        tags[elements], parents[elements], roles[elements] = tag, stack[_ELEMENT, level], role
        level += 1
        depths[elements] = level
        stack[_ELEMENT, level] = elements
        stack[_TAG, level] = tag
        stack[_SAME, level] = last_open[tag]
        last_open[tag] = level
        stack[_WALL, level] = level if trait & WALL else stack[_WALL, level - 1]
        stack[_LIST_LEVEL, level] = level if trait & LIST else stack[_LIST_LEVEL, level - 1]
        stack[_TABLE_LEVEL, level] = level if tag == _TABLE else stack[_TABLE_LEVEL, level - 1]
        stack[_BLOCK_LEVEL, level] = level if trait & BLOCK else stack[_BLOCK_LEVEL, level - 1]
        elements += 1
        if tag == _A:
            inside[_LINKING] = level if marks & HREF else 0
        if not inside[_DROPPING] and not keep_hidden and (trait & DROPPED or role & _HIDDEN):
            inside[_DROPPING] = level
        if not inside[_PREFORMATTING] and trait & PREFORMATTED:
            inside[_PREFORMATTING] = level
        if not inside[_CODING] and tag == _CODE:
            inside[_CODING] = level
    _close(1, level, elements, ends, stack, last_open, inside)
    ends[0] = elements
    block_runs[blocks] = runs
    return elements, runs, blocks


def parse(data: np.ndarray, *, keep_hidden: bool = False) -> Page:
    """The page in `data`, (bytes,) uint8 of UTF-8. With `keep_hidden` what CSS or ARIA hides counts as text too."""
    capacity = min(data.tobytes().count(b"<"), MAX_TAGS) + 2
    elements_out = tuple(np.empty(capacity, kind) for kind in (np.int32, np.int32, np.int32, np.int32, np.int64))
    runs_out = tuple(np.empty(2 * capacity, kind) for kind in (np.int64, np.int64, np.int32, np.int32))
    blocks_out = tuple(np.empty(capacity + 1, np.int32) for _ in range(3))
    title, inside = np.zeros(6, np.int64), np.zeros(4, np.int32)
    stack, last_open = np.zeros((7, MAX_DEPTH + 1), np.int32), np.zeros(len(TRAITS), np.int32)
    tables = (TRAITS, TAG_KEYS, TAG_NUMBERS, ROLE_KEYS, ROLE_BITS)
    elements, runs, blocks = parse_bytes(
        data, keep_hidden, MAX_TAGS, elements_out, runs_out, blocks_out, title, stack, last_open, inside, tables
    )
    blocks_read = (blocks_out[0][: blocks + 1], blocks_out[1][:blocks], blocks_out[2][:blocks])
    parts = [*(array[:elements] for array in elements_out), *(array[:runs] for array in runs_out), *blocks_read, title[:4]]
    return Page._make(parts)
