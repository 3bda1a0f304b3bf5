"""From the bytes of a page to its elements and pieces of text, in one pass of compiled code.

The parser follows HTML's rules where they decide which text belongs where: void and raw elements, implied end tags, end tags
that match nothing, tables as walls. It keeps no attributes, only the roles that their words stand for (`vocabulary.py`).
Every search for an open element is a look-up (`last_open`, and per level the nearest wall, list and table), the depth is
bounded, and each byte is read a bounded number of times, so that the time is linear in the page whatever is in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from bessemer.data.extraction.tags import (
    BLOCK,
    DROPPED,
    ENDS_P,
    HEADING,
    LIST,
    NUMBER,
    PREFORMATTED,
    RAW,
    TABLE_PART,
    TAG_KEYS,
    TAG_NUMBERS,
    TRAITS,
    VOID,
    WALL,
)
from bessemer.data.extraction.vocabulary import ROLE_BIT, ROLE_BITS, ROLE_KEYS, fnv

#: Elements open at once; what lies deeper counts to the last of them.
MAX_DEPTH = 512
#: Tags read of one page: what follows is not read. A page of 50 MB of nothing but tags would fill gigabytes otherwise.
MAX_TAGS = 2_000_000

# Bits of a run.
LINK, PRE, CODE, BREAK, CELL_MARK = 1, 2, 4, 8, 16

_A, _P, _LI, _DT, _DD, _BR, _HR = (NUMBER[n] for n in ("a", "p", "li", "dt", "dd", "br", "hr"))
_TR, _TD, _TH, _TABLE, _OPTION = (NUMBER[n] for n in ("tr", "td", "th", "table", "option"))
_THEAD, _TBODY, _TFOOT, _CODE, _BODY, _HTML = (NUMBER[n] for n in ("thead", "tbody", "tfoot", "code", "body", "html"))
_HEAD, _TITLE, _META, _H1, _H6, _IMG, _MAIN, _ARTICLE = (
    NUMBER[n] for n in ("head", "title", "meta", "h1", "h6", "img", "main", "article")
)
_HIDDEN = ROLE_BIT["hidden"]
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_ROLE_START, _ITEMPROP_START, _ITEMTYPE_START = (np.uint64(fnv(word)) for word in ("role_", "itemprop_", "itemtype_"))
_WORD, _PREFIX, _WHOLE = 0, 1, 2


def _packed_attribute(name: str) -> int:
    """An attribute's name as the parser packs it: its first eight bytes, and its length beside them."""
    number = 0
    for byte in name.encode()[:7]:
        number = (number << 8) | byte
    return (number << 4) | min(len(name), 15)


_AT_CLASS, _AT_ID, _AT_ROLE, _AT_STYLE, _AT_HIDDEN, _AT_HREF = (
    _packed_attribute(n) for n in ("class", "id", "role", "style", "hidden", "href")
)
_AT_ITEMPROP, _AT_ITEMTYPE, _AT_ARIA_HIDDEN, _AT_PROPERTY, _AT_CONTENT, _AT_DATA_TESTID, _AT_START = (
    _packed_attribute(n) for n in ("itemprop", "itemtype", "aria-hidden", "property", "content", "data-testid", "start")
)
_AT_DATA_COMPONENT = _packed_attribute("data-component")


class Page(NamedTuple):
    """A parsed page. N elements in document order, R runs of text, B blocks.

    Elements: `tags`, `parents` (-1 for the root), `depths`, `ends` (one past the last descendant), `roles` of the element
    itself, all (N,). Element 0 is the root.
    Runs: `[start, end)` in the bytes, the innermost `element`, and `flags`, all (R,).
    Blocks: the first run of each, (B + 1,), and the innermost block-level element where it begins, (B,).
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
    title: np.ndarray


@njit(cache=True, nogil=True, inline="always")
def _is_space(byte):
    return byte == 32 or (9 <= byte <= 13)


@njit(cache=True, nogil=True, inline="always")
def _lower(byte):
    return byte + 32 if 65 <= byte <= 90 else byte


@njit(cache=True, nogil=True)
def _look_up(keys, bits, state, way):
    """The bits that a hash stands for when it matches as a word, as a prefix or as the whole name."""
    mask = np.uint64(len(keys) - 1)
    slot = state & mask
    while keys[slot] != 0:
        if keys[slot] == state:
            return bits[slot, way]
        slot = (slot + np.uint64(1)) & mask
    return 0


@njit(cache=True, nogil=True)
def attribute_roles(data, start, end, seed, keys, bits):
    """The roles that the words in `data[start:end]` stand for; every byte is looked at once."""
    found = 0
    word = seed
    joined = seed
    whole = seed
    length = 0
    lower_before = False
    for place in range(start, end + 1):
        byte = data[place] if place < end else np.uint8(32)
        upper = 65 <= byte <= 90
        letter = upper or 97 <= byte <= 122 or 48 <= byte <= 57 or byte >= 128
        if length and (not letter or (upper and lower_before)):
            found |= _look_up(keys, bits, word, _WORD) | _look_up(keys, bits, joined, _WORD)
            joined = word
            word = seed
            length = 0
        if letter:
            low = np.uint64(_lower(byte))
            word = (word ^ low) * _FNV_PRIME
            joined = (joined ^ low) * _FNV_PRIME
            whole = (whole ^ low) * _FNV_PRIME
            length += 1
            if length >= 3:
                found |= _look_up(keys, bits, word, _PREFIX)
        elif _is_space(byte):
            found |= _look_up(keys, bits, whole, _WHOLE)
            joined = seed
            whole = seed
        lower_before = 97 <= byte <= 122
    return found


@njit(cache=True, nogil=True)
def _hides(data, start, end):
    """Whether a `style` takes the element off the page: `display: none` or `visibility: hidden`."""
    previous = 0
    place = start
    while place < end:
        byte = _lower(data[place])
        # the ends of the two words and the first letter of what follows the colon are enough
        if byte == 58 and (previous == 121):
            place += 1
            while place < end and _is_space(data[place]):
                place += 1
            if (
                place + 4 <= end
                and _lower(data[place]) == 110
                and _lower(data[place + 1]) == 111
                and _lower(data[place + 2]) == 110
            ):
                return True
            if (
                place + 6 <= end
                and _lower(data[place]) == 104
                and _lower(data[place + 1]) == 105
                and _lower(data[place + 2]) == 100
            ):
                return True
            previous = 0
            continue
        if not _is_space(byte):
            previous = byte
        place += 1
    return False


@njit(cache=True, nogil=True)
def _pack_name(data, place, end):
    """The packed name that begins at `place` (`tags.pack`; 0 when too long) and where it ends."""
    packed = 0
    length = 0
    while place < end:
        byte = _lower(data[place])
        if _is_space(byte) or byte == 47 or byte == 62:
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


@njit(cache=True, nogil=True)
def _tag_number(packed, keys, numbers):
    slot = (packed ^ (packed >> 9) ^ (packed >> 23)) & 511
    while keys[slot] != 0:
        if keys[slot] == packed:
            return numbers[slot]
        slot = (slot + 1) & 511
    return 0


@njit(cache=True, nogil=True)
def _skip_tag(data, place, end):
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
        if not _is_space(byte):
            after_equals = byte == 61
        place += 1
    return end


@njit(cache=True, nogil=True)
def _find_end_of_raw(data, place, end, name_start, name_end):
    """Where the end tag of a raw element begins, or the end of the page."""
    length = name_end - name_start
    while place < end:
        if data[place] == 60 and place + 2 + length <= end and data[place + 1] == 47:
            same = True
            for index in range(length):
                if _lower(data[place + 2 + index]) != _lower(data[name_start + index]):
                    same = False
                    break
            if same:
                after = place + 2 + length
                if after >= end or _is_space(data[after]) or data[after] == 47 or data[after] == 62:
                    return place
        place += 1
    return end


@njit(cache=True, nogil=True)
def _skip_declaration(data, place, end):
    """One past a comment, doctype, CDATA section or processing instruction that begins at `place`."""
    if place + 3 < end and data[place + 1] == 33 and data[place + 2] == 45 and data[place + 3] == 45:
        place += 4
        if place < end and data[place] == 62:  # <!-->
            return place + 1
        if place + 1 < end and data[place] == 45 and data[place + 1] == 62:  # <!--->
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


@njit(cache=True, nogil=True)
def _grown(array):
    larger = np.empty(2 * len(array), array.dtype)
    larger[: len(array)] = array
    return larger


@njit(cache=True, nogil=True)
def parse_bytes(data, keep_hidden, max_depth, max_tags, traits, tag_keys, tag_numbers, role_keys, role_bits):
    """The elements, runs and blocks of the UTF-8 bytes `data`; see `Page` for what comes back."""
    end = len(data)
    room = 1024
    tags = np.zeros(room, np.int32)
    parents = np.full(room, -1, np.int32)
    depths = np.zeros(room, np.int32)
    ends = np.zeros(room, np.int32)
    roles = np.zeros(room, np.int64)
    elements = 1
    run_room = 1024
    run_starts = np.zeros(run_room, np.int64)
    run_ends = np.zeros(run_room, np.int64)
    run_elements = np.zeros(run_room, np.int32)
    run_flags = np.zeros(run_room, np.int32)
    runs = 0
    block_room = 512
    block_runs = np.zeros(block_room, np.int32)
    block_elements = np.zeros(block_room, np.int32)
    blocks = 0
    in_block = False
    title = np.zeros(4, np.int64)

    # by level; level 0 is the root
    open_element = np.zeros(max_depth + 1, np.int32)
    open_tag = np.zeros(max_depth + 1, np.int32)
    same_before = np.zeros(max_depth + 1, np.int32)  # the level where this tag was open before
    wall = np.zeros(max_depth + 1, np.int32)
    list_level = np.zeros(max_depth + 1, np.int32)
    table_level = np.zeros(max_depth + 1, np.int32)
    block_level = np.zeros(max_depth + 1, np.int32)
    last_open = np.zeros(len(traits), np.int32)
    level = 0
    overflow = 0
    link_level = 0
    drop_level = 0
    pre_level = 0
    code_level = 0
    read = 0

    place = 0
    while place < end and read < max_tags:
        # --- text up to the next markup
        start = place
        visible = False
        while place < end:
            byte = data[place]
            if byte == 60:
                following = data[place + 1] if place + 1 < end else 0
                if (65 <= following <= 90) or (97 <= following <= 122) or following == 47 or following == 33 or following == 63:
                    break
                visible = True
            elif not _is_space(byte) and byte != 0:
                visible = True
            place += 1
        if place > start and (drop_level == 0) and (visible or in_block or pre_level):
            if visible and not in_block:
                if blocks + 1 >= block_room:
                    block_runs, block_elements = _grown(block_runs), _grown(block_elements)
                    block_room *= 2
                block_runs[blocks] = runs
                block_elements[blocks] = open_element[block_level[level]]
                blocks += 1
                in_block = True
            if in_block:
                if runs + 1 >= run_room:
                    run_starts, run_ends = _grown(run_starts), _grown(run_ends)
                    run_elements, run_flags = _grown(run_elements), _grown(run_flags)
                    run_room *= 2
                run_starts[runs] = start
                run_ends[runs] = place
                run_elements[runs] = open_element[level]
                run_flags[runs] = (
                    (LINK if link_level else 0) | (PRE if pre_level else 0) | (CODE if code_level and not pre_level else 0)
                )
                runs += 1
        if place >= end:
            break
        read += 1
        following = data[place + 1] if place + 1 < end else 0
        if following == 33 or following == 63:
            place = _skip_declaration(data, place, end)
            continue
        closing = following == 47
        if closing:
            after = data[place + 2] if place + 2 < end else 0
            if not ((65 <= after <= 90) or (97 <= after <= 122)):
                place = _skip_declaration(data, place, end)
                continue
        name_start = place + 2 if closing else place + 1
        packed, name_end = _pack_name(data, name_start, end)
        tag = _tag_number(packed, tag_keys, tag_numbers)
        trait = traits[tag]

        if closing:
            place = _skip_tag(data, name_end, end)
            if tag == _BODY or tag == _HTML or tag == _HEAD:
                in_block = False
                continue
            if tag == _BR:
                in_block = False
                continue
            if trait & BLOCK:
                in_block = False
            if overflow > 0:
                overflow -= 1
                continue
            if tag == _A:
                link_level = 0
            target = last_open[tag]
            if trait & HEADING:
                for heading in range(_H1, _H6 + 1):
                    target = max(target, last_open[heading])
            if target == 0 or trait & VOID:
                continue
            if trait & TABLE_PART:
                if tag != _TABLE and target < table_level[level]:
                    continue
            elif target < wall[level] or (not trait & BLOCK and target < block_level[level]):
                continue
            # pop to below the target
            while level >= target:
                ends[open_element[level]] = elements
                last_open[open_tag[level]] = same_before[level]
                level -= 1
            link_level = link_level if link_level <= level else 0
            drop_level = drop_level if drop_level <= level else 0
            pre_level = pre_level if pre_level <= level else 0
            code_level = code_level if code_level <= level else 0
            continue

        # --- a start tag and its attributes
        place = name_end
        role = 0
        has_href = False
        hidden = False
        og_title = False
        self_closing = False
        content_start = 0
        content_end = 0
        while place < end:
            byte = data[place]
            if byte == 62:
                break
            if byte == 47:
                self_closing = place + 1 < end and data[place + 1] == 62
                place += 1
                continue
            if _is_space(byte):
                place += 1
                continue
            attribute = 0
            length = 0
            while place < end:
                byte = _lower(data[place])
                if _is_space(byte) or byte == 62 or byte == 47 or (byte == 61 and length):
                    break
                if length < 7:
                    attribute = (attribute << 8) | byte
                length += 1
                place += 1
            attribute = (attribute << 4) | min(length, 15)
            look = place
            while look < end and _is_space(data[look]):
                look += 1
            value_start = value_end = place
            if look < end and data[look] == 61:
                place = look + 1
                while place < end and _is_space(data[place]):
                    place += 1
                value_start = place
                if place < end and (data[place] == 34 or data[place] == 39):
                    quote = data[place]
                    value_start = place + 1
                    place += 1
                    while place < end and data[place] != quote:
                        place += 1
                    value_end = place
                    place += 1
                else:
                    while place < end and data[place] != 62 and not _is_space(data[place]):
                        place += 1
                    value_end = place
            if tag == _BODY or tag == _HTML:
                continue
            if attribute == _AT_CLASS or attribute == _AT_ID or attribute == _AT_DATA_TESTID or attribute == _AT_DATA_COMPONENT:
                role |= attribute_roles(data, value_start, value_end, _FNV_START, role_keys, role_bits)
            elif attribute == _AT_HREF:
                has_href = True
            elif attribute == _AT_ROLE:
                role |= attribute_roles(data, value_start, value_end, _ROLE_START, role_keys, role_bits)
            elif attribute == _AT_ITEMPROP:
                role |= attribute_roles(data, value_start, value_end, _ITEMPROP_START, role_keys, role_bits)
            elif attribute == _AT_ITEMTYPE:
                role |= attribute_roles(data, value_start, value_end, _ITEMTYPE_START, role_keys, role_bits)
            elif attribute == _AT_STYLE:
                hidden = hidden or _hides(data, value_start, value_end)
            elif attribute == _AT_HIDDEN:
                hidden = True
            elif attribute == _AT_ARIA_HIDDEN:
                hidden = hidden or (value_end > value_start and _lower(data[value_start]) == 116)
            elif attribute == _AT_PROPERTY and tag == _META:
                og_title = value_end - value_start == 8 and data[value_start + 3] == 116 and data[value_start + 4] == 105
            elif attribute == _AT_CONTENT and tag == _META:
                content_start, content_end = value_start, value_end
        place = min(place + 1, end)

        if trait & RAW:
            stop = _find_end_of_raw(data, place, end, name_start, name_end)
            if tag == _TITLE and title[1] == 0:
                title[0], title[1] = place, stop
            place = _skip_tag(data, stop, end) if stop < end else end
            continue
        if trait & VOID or (tag == 0 and self_closing):
            if tag == _META and og_title and title[3] == 0:
                title[2], title[3] = content_start, content_end
            elif tag == _HR:
                in_block = False
            elif tag == _BR and in_block and drop_level == 0:
                # a second line break in a row ends the block
                if run_flags[runs - 1] & BREAK and not pre_level:
                    in_block = False
                else:
                    if runs + 1 >= run_room:
                        run_starts, run_ends = _grown(run_starts), _grown(run_ends)
                        run_elements, run_flags = _grown(run_elements), _grown(run_flags)
                        run_room *= 2
                    run_starts[runs] = run_ends[runs] = place
                    run_elements[runs] = open_element[level]
                    run_flags[runs] = BREAK | (PRE if pre_level else 0)
                    runs += 1
            continue
        if tag == _BODY or tag == _HTML or tag == _HEAD:
            in_block = False
            continue
        if trait & BLOCK:
            in_block = False
        if overflow > 0 or level >= max_depth:
            overflow += 1
            continue

        # --- implied ends: the level of the outermost element that ends here, 0 for none
        target = 0
        if trait & ENDS_P and last_open[_P] > wall[level]:
            target = last_open[_P]
        if tag == _LI:
            if last_open[_LI] > list_level[level]:
                target = last_open[_LI]
        elif tag == _DT or tag == _DD:
            other = max(last_open[_DT], last_open[_DD])
            if other > list_level[level]:
                target = other
        elif trait & HEADING:
            if traits[open_tag[level]] & HEADING:
                target = level if target == 0 else target
        elif tag == _TD or tag == _TH:
            other = max(last_open[_TD], last_open[_TH])
            if other > table_level[level]:
                target = other
        elif tag == _TR:
            if last_open[_TR] > table_level[level]:
                target = last_open[_TR]
        elif tag == _THEAD or tag == _TBODY or tag == _TFOOT:
            other = max(last_open[_THEAD], max(last_open[_TBODY], last_open[_TFOOT]))
            if other > table_level[level]:
                target = other
        elif tag == _A:
            if link_level > 0 and last_open[_A] > block_level[level]:
                target = last_open[_A]
            link_level = 0
        elif tag == _OPTION and open_tag[level] == _OPTION:
            target = level
        if target:
            while level >= target:
                ends[open_element[level]] = elements
                last_open[open_tag[level]] = same_before[level]
                level -= 1
            link_level = link_level if link_level <= level else 0
            drop_level = drop_level if drop_level <= level else 0
            pre_level = pre_level if pre_level <= level else 0
            code_level = code_level if code_level <= level else 0

        # --- push
        if elements + 1 >= room:
            tags, parents, depths, ends, roles = _grown(tags), _grown(parents), _grown(depths), _grown(ends), _grown(roles)
            room *= 2
        if hidden or (role & _HIDDEN and (tag == _MAIN or tag == _ARTICLE)):
            role = role | _HIDDEN if hidden else role & ~_HIDDEN
        tags[elements] = tag
        parents[elements] = open_element[level]
        depths[elements] = level + 1
        roles[elements] = role
        below = level
        level += 1
        open_element[level] = elements
        open_tag[level] = tag
        same_before[level] = last_open[tag]
        last_open[tag] = level
        wall[level] = level if trait & WALL else wall[below]
        list_level[level] = level if trait & LIST else list_level[below]
        table_level[level] = level if tag == _TABLE else table_level[below]
        block_level[level] = level if trait & BLOCK else block_level[below]
        elements += 1
        if tag == _A and has_href:
            link_level = level
        if drop_level == 0 and ((trait & DROPPED) or (role & _HIDDEN)) and not keep_hidden:
            drop_level = level
        if trait & PREFORMATTED and pre_level == 0:
            pre_level = level
        if tag == _CODE and code_level == 0:
            code_level = level
    while level > 0:
        ends[open_element[level]] = elements
        level -= 1
    ends[0] = elements
    block_runs[blocks] = runs
    return (
        tags[:elements],
        parents[:elements],
        depths[:elements],
        ends[:elements],
        roles[:elements],
        run_starts[:runs],
        run_ends[:runs],
        run_elements[:runs],
        run_flags[:runs],
        block_runs[: blocks + 1],
        block_elements[:blocks],
        title,
    )


def parse(data: np.ndarray, *, keep_hidden: bool = False) -> Page:
    """The page in `data`, (bytes,) uint8 of UTF-8. With `keep_hidden` what CSS or ARIA hides counts as text too."""
    return Page(*parse_bytes(data, keep_hidden, MAX_DEPTH, MAX_TAGS, TRAITS, TAG_KEYS, TAG_NUMBERS, ROLE_KEYS, ROLE_BITS))
