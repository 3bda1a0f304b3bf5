"""What is known of each block of a page before anything is decided: its text, where it stands, and what stands around it.

Everything is counted once per block, summed once over the tree, and written as one row of numbers for each block, which the
model (`model.py`) reads. All of it is linear in the page.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from bessemer.data.extraction.parsing import BREAK, LINK, Page, _is_space, _look_up, _lower
from bessemer.data.extraction.tags import BLOCK, HEADING, NUMBER, TRAITS
from bessemer.data.extraction.vocabulary import CUE_BITS, CUE_KEYS, CUES, ROLES

#: What is counted of a block's text, in the order of the columns of `count_text`.
COUNTS = (
    "characters",
    "link_characters",
    "words",
    "sentence_ends",
    "commas",
    "digits",
    "capitals",
    "links",
    "closed",
    "title_words",
    "text_hash",
    "wide",
)
_CHARACTERS, _LINK_CHARACTERS, _WORDS, _ENDS, _COMMAS, _DIGITS, _CAPITALS, _LINKS, _CLOSED, _TITLE_WORDS, _HASH, _WIDE = range(
    len(COUNTS)
)

#: Kinds of elements whose distance above a block is a feature.
_ANCESTOR_TAGS = "nav header footer aside article main form figure ul ol dl table blockquote section p pre details".split()
_TAG_KINDS = (
    ("p",),
    ("li",),
    ("h1",),
    ("h2",),
    ("h3", "h4", "h5", "h6"),
    ("td", "th"),
    ("pre", "listing"),
    ("div", "section", "article", "main", "center", "body"),
    ("figcaption", "caption"),
    ("dt", "dd"),
    ("header", "footer", "nav", "aside", "address", "ul", "ol", "form", "label", "legend", "fieldset", "summary"),
    ("blockquote",),
)
#: How far up the surroundings are measured, in block-level ancestors.
_LEVELS = 4
#: How many blocks before and after are looked at.
_REACH = 3
_FAR = 40

FEATURES: tuple[str, ...] = (
    "characters",
    "words",
    "word_length",
    "link_density",
    "links",
    "sentence_ends",
    "sentence_density",
    "commas",
    "digit_share",
    "capital_share",
    "closed",
    "title_share",
    "repeated",
    "depth",
    "block_position",
    "text_position",
    "after_h1",
    "since_h1",
    "since_heading",
    *(f"is_{kind[0]}" for kind in _TAG_KINDS),
    *(f"role_{role}" for role in ROLES),
    *(f"in_{tag}" for tag in _ANCESTOR_TAGS),
    *(f"cue_{cue}" for cue in CUES),
    *(f"section_{cue}" for cue in CUES),
    *(
        f"{what}_{level}"
        for level in range(1, _LEVELS + 1)
        for what in ("chars_up", "links_up", "share_up", "blocks_up", "prose_up")
    ),
    *(
        f"{what}_{place}"
        for place in [*range(-_REACH, 0), *range(1, _REACH + 1)]
        for what in ("chars_at", "links_at", "ends_at", "same_at")
    ),
    "candidate_in",
    "candidate_score",
    "candidate_apart",
    "candidate_share",
    "candidate_before",
    "candidate_after",
    "siblings_alike",
    "page_blocks",
    "page_characters",
    "page_link_density",
    "page_prose",
    "page_has_article",
    "page_has_main",
)

_KIND_OF_TAG = np.full(len(TRAITS), -1, np.int64)
for _number, _kind in enumerate(_TAG_KINDS):
    for _name in _kind:
        if _name in NUMBER:
            _KIND_OF_TAG[NUMBER[_name]] = _number
_ANCESTOR_OF_TAG = np.full(len(TRAITS), -1, np.int64)
for _number, _name in enumerate(_ANCESTOR_TAGS):
    _ANCESTOR_OF_TAG[NUMBER[_name]] = _number
_H1, _ARTICLE, _MAIN = NUMBER["h1"], NUMBER["article"], NUMBER["main"]
_N_ROLES, _N_TAGS, _N_KINDS, _N_CUES = len(ROLES), len(_ANCESTOR_TAGS), len(_TAG_KINDS), len(CUES)
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_N_FEATURES = len(FEATURES)


@njit(cache=True, nogil=True)
def title_words(data, start, end):
    """The hashes of the title's words, sorted, (words,) uint64."""
    found = np.zeros(64, np.uint64)
    count = 0
    word = _FNV_START
    length = 0
    for place in range(start, end + 1):
        byte = data[place] if place < end else np.uint8(32)
        if (97 <= _lower(byte) <= 122) or 48 <= byte <= 57 or byte >= 128:
            word = (word ^ np.uint64(_lower(byte))) * _FNV_PRIME
            length += 1
        elif length:
            if length > 2 and count < 64:
                found[count] = word
                count += 1
            word = _FNV_START
            length = 0
    return np.sort(found[:count])


@njit(cache=True, nogil=True)
def count_text(data, run_starts, run_ends, run_flags, block_runs, title, cue_keys, cue_bits):
    """`COUNTS` of each block, (B, 12) int64, and how often each cue occurs in it, (B, cues) int32.

    `closed` is 2 after a full stop or its like at the end, 1 after a colon, comma or closing quote, else 0. A wide
    character (Chinese, Japanese, Korean) counts as half a word, since no space parts them.
    """
    blocks = len(block_runs) - 1
    counts = np.zeros((blocks, 12), np.int64)
    cues = np.zeros((blocks, _N_CUES), np.int32)
    for block in range(blocks):
        characters = link_characters = words = ends = commas = digits = capitals = links = wide = 0
        in_title = 0
        last = 0
        text_hash = _FNV_START
        word = _FNV_START
        length = 0
        space = True
        linked = False
        for run in range(block_runs[block], block_runs[block + 1]):
            flags = run_flags[run]
            if flags & LINK and not linked:
                links += 1
            linked = flags & LINK != 0
            before = characters
            place = run_starts[run]
            stop = run_ends[run]
            if flags & BREAK:
                space = True
            while place <= stop:
                # one more step after the last run, so that the last word is counted
                if place < stop:
                    byte = data[place]
                elif run == block_runs[block + 1] - 1 or flags & BREAK:
                    byte = np.uint8(32)
                else:
                    break
                if byte == 38:  # an entity is one character
                    look = place + 1
                    while look < stop and look - place < 12 and data[look] != 59 and not _is_space(data[look]):
                        look += 1
                    if look < stop and data[look] == 59:
                        blank = look - place == 5 and data[place + 1] == 110 and data[place + 2] == 98  # &nbsp;
                        place = look
                        byte = np.uint8(32) if blank else np.uint8(39)
                letter = (97 <= _lower(byte) <= 122) or 48 <= byte <= 57 or byte >= 128
                if letter:
                    if byte < 128 or byte >= 192:
                        characters += 1
                        if length == 0 and 65 <= byte <= 90:
                            capitals += 1
                    if 48 <= byte <= 57:
                        digits += 1
                    if 0xE3 <= byte <= 0xED:
                        wide += 1
                    if byte == 0x82 and place > 1 and data[place - 1] == 0x80 and data[place - 2] == 0xE3:
                        ends += 1  # 。
                        last = 46
                    elif byte >= 128 and byte < 192:
                        # the third byte of “ ” ’ … tells closing marks apart from letters closely enough
                        if place > 1 and data[place - 2] == 0xE2 and data[place - 1] == 0x80:
                            last = 46 if byte == 0xA6 else (34 if (byte == 0x9D or byte == 0x9C) else last)
                            length = max(length, 0)
                        else:
                            last = 97
                    elif byte < 128:
                        last = 97
                    low = np.uint64(_lower(byte))
                    word = (word ^ low) * _FNV_PRIME
                    text_hash = (text_hash ^ low) * _FNV_PRIME
                    length += 1
                    space = False
                else:
                    if length:
                        words += 1
                        found = _look_up(cue_keys, cue_bits, word, 0)
                        if found:
                            for cue in range(_N_CUES):
                                cues[block, cue] += (found >> cue) & 1
                        if length > 2 and len(title):
                            at = np.searchsorted(title, word)
                            in_title += at < len(title) and title[at] == word
                        word = _FNV_START
                        length = 0
                    if _is_space(byte) or byte == 0:
                        if not space:
                            characters += 1
                        space = True
                    else:
                        characters += 1
                        space = False
                        if byte == 46 or byte == 33 or byte == 63:
                            ends += last == 97 or last == 34
                            last = 46
                        elif byte == 44 or byte == 59:
                            commas += 1
                            last = 44
                        elif byte == 58:
                            last = 58
                        elif byte == 34 or byte == 39 or byte == 41:
                            last = 46 if last == 46 else 34
                        else:
                            last = byte
                place += 1
            if flags & LINK:
                link_characters += characters - before
        if space and characters > 0:
            characters -= 1
        counts[block, _CHARACTERS] = characters
        counts[block, _LINK_CHARACTERS] = min(link_characters, characters)
        counts[block, _WORDS] = words + wide // 2
        counts[block, _ENDS] = ends
        counts[block, _COMMAS] = commas
        counts[block, _DIGITS] = digits
        counts[block, _CAPITALS] = capitals
        counts[block, _LINKS] = links
        counts[block, _CLOSED] = 2 if last == 46 else (1 if last == 58 or last == 44 or last == 34 else 0)
        counts[block, _TITLE_WORDS] = in_title
        counts[block, _HASH] = np.int64(text_hash & np.uint64(0x7FFFFFFFFFFFFFFF))
        counts[block, _WIDE] = wide
    return counts, cues


@njit(cache=True, nogil=True)
def is_prose(counts, block):
    """Whether a block reads like sentences rather than like labels."""
    characters = counts[block, _CHARACTERS]
    return (
        characters >= 60 and counts[block, _LINK_CHARACTERS] * 2 < characters and (counts[block, _ENDS] > 0 or characters > 140)
    )


@njit(cache=True, nogil=True)
def sum_over_tree(parents, block_elements, counts):
    """Of each element with all below it: characters, link characters, blocks, characters of prose, (N, 4) int64."""
    elements = len(parents)
    sums = np.zeros((elements, 4), np.int64)
    for block in range(len(block_elements)):
        element = block_elements[block]
        sums[element, 0] += counts[block, _CHARACTERS]
        sums[element, 1] += counts[block, _LINK_CHARACTERS]
        sums[element, 2] += 1
        sums[element, 3] += counts[block, _CHARACTERS] if is_prose(counts, block) else 0
    for element in range(elements - 1, 0, -1):
        for column in range(4):
            sums[parents[element], column] += sums[element, column]
    return sums


@njit(cache=True, nogil=True)
def score_candidates(tags, parents, roles, block_elements, counts, sums, traits, good, bad):
    """How likely each element is to be the one around the main text, (N,) float64 (after Arc90's Readability).

    Each block of prose gives its parent points for length and commas, its grandparent half of them; roles add or take a
    quarter, and links take their share.
    """
    scores = np.zeros(len(tags))
    for block in range(len(block_elements)):
        if not is_prose(counts, block):
            continue
        points = 1.0 + min(counts[block, _COMMAS], 10) + min(counts[block, _CHARACTERS] / 100.0, 5.0)
        element = block_elements[block]
        scores[element] += points * 0.5
        weight = points
        steps = 0
        while element > 0 and steps < 3:
            element = parents[element]
            if traits[tags[element]] & BLOCK or element == 0:
                scores[element] += weight
                weight *= 0.5
                steps += 1
    for element in range(len(tags)):
        if scores[element] > 0:
            factor = 1.0
            if roles[element] & good:
                factor += 0.25
            if roles[element] & bad:
                factor -= 0.5
            scores[element] *= factor * (1.0 - sums[element, 1] / max(1, sums[element, 0]))
    return scores


@njit(cache=True, nogil=True)
def describe(
    tags, parents, depths, ends, roles, block_elements, counts, cues, sums, scores, traits, kind_of_tag, ancestor_of_tag
):
    """`FEATURES` of each block, (B, F) float32."""
    blocks = len(block_elements)
    elements = len(tags)
    rows = np.zeros((blocks, _N_FEATURES), np.float32)
    page_characters = max(1, sums[0, 0])

    # distances to roles and tags, handed down from parent to child
    role_near = np.full((elements, _N_ROLES), _FAR, np.uint8)
    tag_near = np.full((elements, _N_TAGS), _FAR, np.uint8)
    best_above = np.zeros(elements, np.float64)
    best = 0
    has_article = has_main = False
    for element in range(1, elements):
        parent = parents[element]
        step = 1 if traits[tags[element]] & BLOCK else 0
        for role in range(_N_ROLES):
            role_near[element, role] = 0 if (roles[element] >> role) & 1 else min(_FAR, role_near[parent, role] + step)
        for tag in range(_N_TAGS):
            tag_near[element, tag] = min(_FAR, tag_near[parent, tag] + step)
        if ancestor_of_tag[tags[element]] >= 0:
            tag_near[element, ancestor_of_tag[tags[element]]] = 0
        if scores[element] > scores[best]:
            best = element
        best_above[element] = max(best_above[parent], scores[element])
        has_article |= tags[element] == _ARTICLE
        has_main |= tags[element] == _MAIN
    best_score = max(scores[best], 1e-9)
    on_best_path = np.zeros(elements, np.uint8)
    element = best
    while element >= 0:
        on_best_path[element] = 1
        element = parents[element]

    # how often each text occurs, and how many siblings look alike
    order = np.argsort(counts[:, _HASH])
    repeated = np.ones(blocks, np.int64)
    start = 0
    for place in range(1, blocks + 1):
        if place == blocks or counts[order[place], _HASH] != counts[order[start], _HASH]:
            for other in range(start, place):
                repeated[order[other]] = place - start
            start = place
    alike = np.ones(elements, np.int64)
    last_child = np.zeros(elements, np.int64)
    for element in range(1, elements):
        parent = parents[element]
        before = last_child[parent]
        if before and tags[before] == tags[element] and roles[before] == roles[element]:
            alike[element] = alike[before] + 1
        last_child[parent] = element
    for element in range(elements - 1, 0, -1):
        before = last_child[parents[element]]
        if before > element and alike[before] > alike[element] and tags[before] == tags[element]:
            alike[element] = alike[before]
        last_child[parents[element]] = element

    first_h1 = -1
    longest_h1 = -1
    for block in range(blocks):
        if tags[block_elements[block]] == _H1:
            if first_h1 < 0:
                first_h1 = block
            if longest_h1 < 0 or counts[block, _TITLE_WORDS] > counts[longest_h1, _TITLE_WORDS]:
                longest_h1 = block
    h1 = longest_h1
    candidate_first = blocks
    candidate_last = -1
    for block in range(blocks):
        element = block_elements[block]
        if best <= element < ends[best]:
            candidate_first = min(candidate_first, block)
            candidate_last = block

    seen = 0
    heading = -1
    for block in range(blocks):
        element = block_elements[block]
        characters = counts[block, _CHARACTERS]
        length = max(1, characters)
        words = max(1, counts[block, _WORDS])
        column = 0
        rows[block, 0] = np.log1p(characters)
        rows[block, 1] = np.log1p(counts[block, _WORDS])
        rows[block, 2] = min(30.0, characters / words)
        rows[block, 3] = counts[block, _LINK_CHARACTERS] / length
        rows[block, 4] = min(50, counts[block, _LINKS])
        rows[block, 5] = np.log1p(counts[block, _ENDS])
        rows[block, 6] = counts[block, _ENDS] / words
        rows[block, 7] = np.log1p(counts[block, _COMMAS])
        rows[block, 8] = counts[block, _DIGITS] / length
        rows[block, 9] = counts[block, _CAPITALS] / words
        rows[block, 10] = counts[block, _CLOSED]
        rows[block, 11] = counts[block, _TITLE_WORDS] / words
        rows[block, 12] = min(20, repeated[block])
        rows[block, 13] = min(60, depths[element])
        rows[block, 14] = block / blocks
        rows[block, 15] = seen / page_characters
        rows[block, 16] = 0 if h1 < 0 else (1 if block > h1 else (2 if block == h1 else -1))
        rows[block, 17] = 99 if h1 < 0 else max(-99, min(99, block - h1))
        is_heading = traits[tags[element]] & HEADING != 0
        if is_heading:
            heading = block
        rows[block, 18] = 99 if heading < 0 else min(99, block - heading)
        column = 19
        if kind_of_tag[tags[element]] >= 0:
            rows[block, column + kind_of_tag[tags[element]]] = 1
        column += _N_KINDS
        for role in range(_N_ROLES):
            rows[block, column + role] = role_near[element, role]
        column += _N_ROLES
        for tag in range(_N_TAGS):
            rows[block, column + tag] = tag_near[element, tag]
        column += _N_TAGS
        for cue in range(_N_CUES):
            rows[block, column + cue] = cues[block, cue] / words if characters < 300 else 0
            if heading >= 0:
                rows[block, column + _N_CUES + cue] = cues[heading, cue] / max(1, counts[heading, _WORDS])
        column += 2 * _N_CUES
        above = element
        for _ in range(_LEVELS):
            # up to the next block-level ancestor that holds more than what is below it
            inner = above
            while above > 0 and (not traits[tags[above]] & BLOCK or sums[above, 2] == sums[inner, 2]):
                above = parents[above]
                if traits[tags[above]] & BLOCK and sums[above, 2] > sums[inner, 2]:
                    break
            rows[block, column] = np.log1p(sums[above, 0])
            rows[block, column + 1] = sums[above, 1] / max(1, sums[above, 0])
            rows[block, column + 2] = sums[above, 0] / page_characters
            rows[block, column + 3] = np.log1p(sums[above, 2])
            rows[block, column + 4] = sums[above, 3] / max(1, sums[above, 0])
            column += 5
        for offset in range(-_REACH, _REACH + 1):
            if offset == 0:
                continue
            other = block + offset
            if 0 <= other < blocks:
                rows[block, column] = np.log1p(counts[other, _CHARACTERS])
                rows[block, column + 1] = counts[other, _LINK_CHARACTERS] / max(1, counts[other, _CHARACTERS])
                rows[block, column + 2] = np.log1p(counts[other, _ENDS])
                rows[block, column + 3] = tags[block_elements[other]] == tags[element]
            else:
                rows[block, column] = -1
                rows[block, column + 1] = -1
            column += 4
        rows[block, column] = best <= element < ends[best]
        rows[block, column + 1] = best_above[element] / best_score
        above = element
        apart = 0
        while not on_best_path[above]:
            apart += traits[tags[above]] & BLOCK != 0
            above = parents[above]
        rows[block, column + 2] = apart
        rows[block, column + 3] = sums[best, 0] / page_characters
        rows[block, column + 4] = max(0, min(99, candidate_first - block))
        rows[block, column + 5] = max(0, min(99, block - candidate_last))
        most = 1
        above = element
        for _ in range(5):
            most = max(most, alike[above])
            if above == 0:
                break
            above = parents[above]
        rows[block, column + 6] = min(50, most)
        rows[block, column + 7] = np.log1p(blocks)
        rows[block, column + 8] = np.log1p(sums[0, 0])
        rows[block, column + 9] = sums[0, 1] / page_characters
        rows[block, column + 10] = sums[0, 3] / page_characters
        rows[block, column + 11] = has_article
        rows[block, column + 12] = has_main
        seen += characters
    return rows


_ROLE_LIST = list(ROLES)


def _mask(*names: str) -> int:
    return sum(1 << _ROLE_LIST.index(name) for name in names)


_GOOD = _mask("body", "article", "main", "forum", "product", "lead")
_BAD = _mask(
    "comment", "navigation", "breadcrumb", "footer", "sidebar", "related", "share", "advertising", "consent", "author_box",
    "subscribe", "popup", "pagination", "search", "signature",
)  # fmt: skip


def features(data: np.ndarray, page: Page) -> tuple[np.ndarray, np.ndarray]:
    """`FEATURES` of each block of the page, (B, F) float32, and `COUNTS`, (B, 12) int64."""
    start, end = (page.title[2], page.title[3]) if page.title[3] else (page.title[0], page.title[1])
    title = title_words(data, start, end)
    counts, cues = count_text(data, page.run_starts, page.run_ends, page.run_flags, page.block_runs, title, CUE_KEYS, CUE_BITS)
    sums = sum_over_tree(page.parents, page.block_elements, counts)
    scores = score_candidates(page.tags, page.parents, page.roles, page.block_elements, counts, sums, TRAITS, _GOOD, _BAD)
    rows = describe(
        page.tags,
        page.parents,
        page.depths,
        page.ends,
        page.roles,
        page.block_elements,
        counts,
        cues,
        sums,
        scores,
        TRAITS,
        _KIND_OF_TAG,
        _ANCESTOR_OF_TAG,
    )
    return rows, counts
