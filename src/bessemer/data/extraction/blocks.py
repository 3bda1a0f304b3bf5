"""Measures of a page's blocks: counts of characters, words, links and cues, summed over the tree; a word score.

The word score comes from weights of hashed words, fitted by logistic regression. A word, its place among the first two, and a
pair among the first six are each hashed into one of `BUCKETS` weights, so that no list of words is kept. The score of a block
is the sum of its weights over the root of their number.
"""

# ruff: noqa: SIM109 - the compiler makes jumps of comparisons, and a tuple of `in`

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.attributes import FNV_PRIME, FNV_START, is_space, look_up, lower
from bessemer.data.extraction.parsing import BREAK, LINK, Page
from bessemer.data.extraction.vocabulary import BLOCK, CUES, NUMBER
from bessemer.data.text.compiled import compiled

#: What is counted of a block: the columns of `count_text`, and the group of blocks with the same signature.
CHARACTERS, LINK_CHARACTERS, WORDS, ENDS, COMMAS, DIGITS, CAPITALS, LINKS, CLOSED, TITLE_WORDS, HASH, WIDE = range(12)
FUNCTION_WORDS, SYMBOLS, STRONG, SLANTED, FIRST_CUES, GROUP = range(12, 18)
N_COUNTS = 18
N_CUES = len(CUES)

_B, _BIG, _STRONG_TAG, _I, _EM, _CITE, _SMALL = (NUMBER[n] for n in ("b", "big", "strong", "i", "em", "cite", "small"))
_TITLE_MASK = np.uint64(255)


@compiled
def _is_word(byte: int) -> bool:
    """Whether a byte is part of a word: a letter or digit, or of a character beyond ASCII."""
    return 97 <= lower(byte) <= 122 or 48 <= byte <= 57 or byte >= 128


@compiled
def _holds(table: np.ndarray, state: int) -> bool:
    slot = state & _TITLE_MASK
    while table[slot] != 0:
        if table[slot] == state:
            return True
        slot = (slot + np.uint64(1)) & _TITLE_MASK
    return False


@compiled
def title_words(data: np.ndarray, start: int, end: int, table: np.ndarray) -> None:
    """Puts the hashes of the title's first 64 words of three bytes or more into `table`, (256,) uint64 of zeros."""
    word = FNV_START
    length = 0
    taken = 0
    for place in range(start, end + 1):
        byte = data[place] if place < end else 32
        if _is_word(byte):
            word = (word ^ np.uint64(lower(byte))) * FNV_PRIME
            length += 1
        elif length:
            if length > 2 and taken < 64:
                taken += 1
                slot = word & _TITLE_MASK
                while table[slot] != 0 and table[slot] != word:
                    slot = (slot + np.uint64(1)) & _TITLE_MASK
                table[slot] = word
            word = FNV_START
            length = 0


@compiled
def count_text(
    data: np.ndarray,
    page: Page,
    title: np.ndarray,
    cue_keys: np.ndarray,
    cue_bits: np.ndarray,
    traits: np.ndarray,
    counts: np.ndarray,
    cues: np.ndarray,
) -> None:
    """Fills `counts`, (B, N_COUNTS), but for the last column, and `cues`, (B, cues) of zeros, with how often
    each occurs in it.

    `closed` is 2 after a full stop or its like at the end, 1 after a colon, comma or closing quote, else 0. A wide
    character (Chinese, Japanese, Korean) counts as half a word, since no space parts them. `strong` and `slanted` are the
    characters in elements such as `b` and `em`; `first_cues` has the bits of the cues among the first two words.
    """
    run_starts, run_ends, run_flags, block_runs, run_elements, tags, parents = (
        page.run_starts,
        page.run_ends,
        page.run_flags,
        page.block_runs,
        page.run_elements,
        page.tags,
        page.parents,
    )
    for block in range(len(block_runs) - 1):
        characters = link_characters = words = ends = commas = digits = capitals = links = wide = 0
        function_words = symbols = strong = slanted = first_cues = 0
        in_title = 0
        last = 0
        text_hash = FNV_START
        word = FNV_START
        length = 0
        space = True
        linked = False
        for run in range(block_runs[block], block_runs[block + 1]):
            flags = run_flags[run]
            if flags & LINK and not linked:
                links += 1
            linked = flags & LINK != 0
            bold = italic = False
            element = run_elements[run]
            # the elements within the block
            for _ in range(4):
                tag = tags[element]
                if element == 0 or traits[tag] & BLOCK:
                    break
                bold = bold or tag == _B or tag == _STRONG_TAG or tag == _BIG
                italic = italic or tag == _I or tag == _EM or tag == _CITE or tag == _SMALL
                element = parents[element]
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
                # an entity is one character
                if byte == 38:
                    look = place + 1
                    while look < stop and look - place < 12 and data[look] != 59 and not is_space(data[look]):
                        look += 1
                    if look < stop and data[look] == 59:
                        # &nbsp;
                        blank = look - place == 5 and data[place + 1] == 110 and data[place + 2] == 98
                        place = look
                        byte = np.uint8(32) if blank else np.uint8(39)
                if _is_word(byte):
                    if byte < 128 or byte >= 192:
                        characters += 1
                        if length == 0 and 65 <= byte <= 90:
                            capitals += 1
                    if 48 <= byte <= 57:
                        digits += 1
                    if 0xE3 <= byte <= 0xED:
                        wide += 1
                    if byte == 0x82 and place > 1 and data[place - 1] == 0x80 and data[place - 2] == 0xE3:
                        # 。
                        ends += 1
                        last = 46
                    elif byte >= 128 and byte < 192:
                        # the third byte of “ ” ’ … is enough to tell closing marks from letters
                        if place > 1 and data[place - 2] == 0xE2 and data[place - 1] == 0x80:
                            last = 46 if byte == 0xA6 else (34 if (byte == 0x9D or byte == 0x9C) else last)
                        else:
                            last = 97
                    elif byte < 128:
                        last = 97
                    low = np.uint64(lower(byte))
                    word = (word ^ low) * FNV_PRIME
                    text_hash = (text_hash ^ low) * FNV_PRIME
                    length += 1
                    space = False
                else:
                    if length:
                        words += 1
                        cue_bits_here = look_up(cue_keys, cue_bits, word, 0)
                        if cue_bits_here:
                            if words <= 2:
                                first_cues |= cue_bits_here
                            function_words += (cue_bits_here >> N_CUES) & 1
                            for cue in range(N_CUES):
                                cues[block, cue] += (cue_bits_here >> cue) & 1
                        in_title += length > 2 and _holds(title, word)
                        word = FNV_START
                        length = 0
                    if is_space(byte) or byte == 0:
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
                            symbols += byte != 45 and byte != 40
                place += 1
            if flags & LINK:
                link_characters += characters - before
            if bold:
                strong += characters - before
            if italic:
                slanted += characters - before
        if space and characters > 0:
            characters -= 1
        counts[block, CHARACTERS] = characters
        counts[block, LINK_CHARACTERS] = min(link_characters, characters)
        counts[block, WORDS] = words + wide // 2
        counts[block, ENDS] = ends
        counts[block, COMMAS] = commas
        counts[block, DIGITS] = digits
        counts[block, CAPITALS] = capitals
        counts[block, LINKS] = links
        counts[block, CLOSED] = 2 if last == 46 else (1 if last == 58 or last == 44 or last == 34 else 0)
        counts[block, TITLE_WORDS] = in_title
        counts[block, HASH] = np.int64(text_hash & np.uint64(0x7FFFFFFFFFFFFFFF))
        counts[block, WIDE] = wide
        counts[block, FUNCTION_WORDS] = function_words
        counts[block, SYMBOLS] = symbols
        counts[block, STRONG] = strong
        counts[block, SLANTED] = slanted
        counts[block, FIRST_CUES] = first_cues


@compiled
def is_prose(counts: np.ndarray, block: int) -> bool:
    """Whether a block reads like sentences rather than like labels."""
    characters = counts[block, CHARACTERS]
    return (
        characters >= 60 and counts[block, LINK_CHARACTERS] * 2 < characters and (counts[block, ENDS] > 0 or characters > 140)
    )


@compiled
def sum_over_tree(page: Page, counts: np.ndarray, sums: np.ndarray) -> None:
    """Fills `sums`, (N, 4) of zeros: of each element with all below it characters, link characters, blocks, prose."""
    parents, block_elements = page.parents, page.block_elements
    for block in range(len(block_elements)):
        element = block_elements[block]
        sums[element, 0] += counts[block, CHARACTERS]
        sums[element, 1] += counts[block, LINK_CHARACTERS]
        sums[element, 2] += 1
        if is_prose(counts, block):
            sums[element, 3] += counts[block, CHARACTERS]
    for element in range(len(parents) - 1, 0, -1):
        for column in range(4):
            sums[parents[element], column] += sums[element, column]


BUCKETS = 1 << 14
#: Most words of a block that are read, and most hashes made of them.
MOST_WORDS, MOST_HASHED = 60, 68
_FIRST = np.uint64(0x5BD1E995)


@compiled
def _bucket(state: np.uint64) -> int:
    return int((state ^ (state >> np.uint64(29))) & np.uint64(BUCKETS - 1))


@compiled
def score_words(data: np.ndarray, page: Page, weights: np.ndarray, scores: np.ndarray, buckets: np.ndarray) -> None:
    """Fills `scores`, (B,), and, unless it has no rows, `buckets`, (B, MOST_HASHED) of -1, with the weights that were added."""
    run_starts, run_ends, block_runs = page.run_starts, page.run_ends, page.block_runs
    for block in range(len(block_runs) - 1):
        words = hashed = 0
        total = 0.0
        word = before = FNV_START
        length = 0
        for run in range(block_runs[block], block_runs[block + 1]):
            for place in range(run_starts[run], run_ends[run] + 1):
                byte = np.int64(lower(data[place])) if place < run_ends[run] else 32
                if 97 <= byte <= 122 or byte >= 128 or 48 <= byte <= 57:
                    word = (word ^ np.uint64(48 if byte < 58 else byte)) * FNV_PRIME
                    length += 1
                elif length:
                    words += 1
                    for kind in range(3):
                        if (kind == 1 and words > 2) or (kind == 2 and not 2 <= words <= 6):
                            continue
                        state = word if kind == 0 else (word ^ _FIRST if kind == 1 else (before * FNV_PRIME) ^ word)
                        bucket = _bucket(state * FNV_PRIME)
                        total += weights[bucket]
                        if len(buckets):
                            buckets[block, hashed] = bucket
                        hashed += 1
                    before = word
                    word = FNV_START
                    length = 0
                if words == MOST_WORDS:
                    break
            if words == MOST_WORDS:
                break
        scores[block] = total / np.sqrt(max(1, hashed))


def word_scores(data: np.ndarray, page: Page, weights: np.ndarray) -> np.ndarray:
    """The score of each block, (B,) float64."""
    scores = np.empty(len(page.block_elements))
    score_words(data, page, weights, scores, np.empty((0, MOST_HASHED), np.int32))
    return scores
