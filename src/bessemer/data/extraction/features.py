"""Features of the blocks of a page: their text, their place, and what stands around them.

Everything is counted once per block, summed once over the tree, and written as one row of numbers for each block, which the
model (`model.py`) reads. All of it is linear in the page.
"""

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.attributes import FNV_PRIME, FNV_START
from bessemer.data.extraction.blocks import (
    CAPITALS,
    CHARACTERS,
    CLOSED,
    COMMAS,
    DIGITS,
    ENDS,
    FIRST_CUES,
    FUNCTION_WORDS,
    GROUP,
    HASH,
    LINK_CHARACTERS,
    LINKS,
    N_COUNTS,
    N_CUES,
    SLANTED,
    STRONG,
    SYMBOLS,
    TITLE_WORDS,
    WORDS,
    count_text,
    is_prose,
    sum_over_tree,
    title_words,
    word_scores,
)
from bessemer.data.extraction.model import (
    ANCESTOR_OF_TAG,
    ARTICLE,
    BAD,
    CANDIDATE_AT,
    CUES_AT,
    FAR,
    FEATURES,
    GOOD,
    GROUP_AT,
    H1,
    KIND_OF_TAG,
    KINDS_AT,
    LEVELS,
    MAIN,
    N_ROLES,
    N_TAGS,
    NEAR_AT,
    PAGE_AT,
    PAGE_ROLES,
    REACH,
    SHAPE_AT,
    SINCE_AT,
    UP_AT,
    WORDS_AT,
)
from bessemer.data.extraction.parsing import Page
from bessemer.data.extraction.vocabulary import BLOCK, CUE_BITS, CUE_KEYS, HEADING, ROLE_BIT, TRAITS
from bessemer.data.text.compiled import compiled


@compiled
def score_candidates(page: Page, counts: np.ndarray, sums: np.ndarray, traits: np.ndarray, scores: np.ndarray) -> int:
    """Fills `scores`, (N,) of zeros: how likely each element is to be the one around the main text. Returns the best.

    Each block of prose gives the element it stands in points for length and commas, and the elements around that one ever
    fewer (after Arc90's Readability); roles add or take a share, and links take theirs.
    """
    tags, parents, roles, block_elements = page.tags, page.parents, page.roles, page.block_elements
    for block in range(len(block_elements)):
        if not is_prose(counts, block):
            continue
        points = 1.0 + min(counts[block, COMMAS], 10) + min(counts[block, CHARACTERS] / 100.0, 5.0)
        element = block_elements[block]
        scores[element] += points * 0.5
        steps = 0
        while element > 0 and steps < 3:
            element = parents[element]
            if traits[tags[element]] & BLOCK or element == 0:
                scores[element] += points
                points *= 0.5
                steps += 1
    best = 0
    for element in range(len(tags)):
        factor = 1.0
        if element and roles[element] & GOOD:
            factor += 0.25
        if element and roles[element] & BAD:
            factor -= 0.5
        scores[element] *= factor * (1.0 - sums[element, 1] / max(1, sums[element, 0]))
        if scores[element] > scores[best]:
            best = element
    return best


@compiled
def hand_down(
    page: Page,
    traits: np.ndarray,
    ancestor_of_tag: np.ndarray,
    scores: np.ndarray,
    near: np.ndarray,
    best_above: np.ndarray,
    alike: np.ndarray,
    last_child: np.ndarray,
) -> None:
    """Fills what an element takes from its ancestors and siblings.

    `near`, (N, roles + tags) uint8: how many block-level elements up the next one with a role or tag is. `best_above`,
    (N,): the highest score on the way up. `alike`, (N,) of ones: siblings with its tag and roles; `last_child`, (N,) of zeros,
    is scratch.
    """
    tags, parents, roles = page.tags, page.parents, page.roles
    columns = near.shape[1]
    for element in range(1, len(tags)):
        parent = parents[element]
        tag = tags[element]
        step = 1 if traits[tag] & BLOCK else 0
        for column in range(columns):
            near[element, column] = min(FAR, near[parent, column] + step)
        bits = roles[element]
        column = 0
        while bits:
            if bits & 1:
                near[element, column] = 0
            bits >>= 1
            column += 1
        if ancestor_of_tag[tag] >= 0:
            near[element, N_ROLES + ancestor_of_tag[tag]] = 0
        best_above[element] = max(best_above[parent], scores[element])
        before = last_child[parent]
        if before and tags[before] == tag and roles[before] == roles[element]:
            alike[element] = alike[before] + 1
        last_child[parent] = element
    for element in range(len(tags) - 1, 0, -1):
        before = last_child[parents[element]]
        if before > element and alike[before] > alike[element] and tags[before] == tags[element]:
            alike[element] = alike[before]
        last_child[parents[element]] = element


@compiled
def describe_text(rows: np.ndarray, counts: np.ndarray, cues: np.ndarray, repeated: np.ndarray, headings: np.ndarray) -> None:
    """The columns about a block's own text, and about the heading above it (`headings`, (B,): its block or -1)."""
    for block in range(len(rows)):
        characters = counts[block, CHARACTERS]
        length = max(1, characters)
        words = max(1, counts[block, WORDS])
        row = rows[block]
        row[0] = np.log1p(characters)
        row[1] = np.log1p(counts[block, WORDS])
        row[2] = min(30.0, characters / words)
        row[3] = counts[block, LINK_CHARACTERS] / length
        row[4] = min(50, counts[block, LINKS])
        row[5] = np.log1p(counts[block, ENDS])
        row[6] = counts[block, ENDS] / words
        row[7] = np.log1p(counts[block, COMMAS])
        row[8] = counts[block, DIGITS] / length
        row[9] = counts[block, CAPITALS] / words
        row[10] = counts[block, CLOSED]
        row[11] = counts[block, TITLE_WORDS] / words
        row[12] = min(20, repeated[block])
        heading = headings[block]
        row[18] = 99 if heading < 0 else min(99, block - heading)
        for cue in range(N_CUES):
            row[CUES_AT + cue] = cues[block, cue] / words if characters < 300 else 0
            if heading >= 0:
                row[CUES_AT + N_CUES + cue] = cues[heading, cue] / max(1, counts[heading, WORDS])


@compiled
def describe_shape(rows: np.ndarray, counts: np.ndarray, media: np.ndarray) -> None:
    """The columns about a block's words and marks, its emphasis, its first words, and pictures before and behind it."""
    blocks = len(rows)
    for block in range(blocks):
        length = max(1, counts[block, CHARACTERS])
        row = rows[block]
        column = SHAPE_AT
        row[column] = counts[block, FUNCTION_WORDS] / max(1, counts[block, WORDS])
        row[column + 1] = counts[block, SYMBOLS] / length
        row[column + 2] = counts[block, STRONG] / length
        row[column + 3] = counts[block, SLANTED] / length
        row[column + 4] = min(5, media[block])
        row[column + 5] = min(5, media[block + 1]) if block + 1 < blocks else 0
        for cue in range(N_CUES):
            row[column + 6 + cue] = (counts[block, FIRST_CUES] >> cue) & 1


@compiled
def sign(page: Page, signatures: np.ndarray) -> None:
    """Fills `signatures`, (B,) uint64: a hash of the tags and roles of a block's element and the two above it."""
    tags, parents, roles, block_elements = page.tags, page.parents, page.roles, page.block_elements
    for block in range(len(block_elements)):
        state = FNV_START
        element = block_elements[block]
        for _ in range(3):
            state = (state ^ np.uint64(tags[element])) * FNV_PRIME
            state = (state ^ np.uint64(roles[element])) * FNV_PRIME
            element = max(0, parents[element])
        signatures[block] = state


@compiled
def describe_groups(rows: np.ndarray, counts: np.ndarray, page: Page, sums: np.ndarray, groups: np.ndarray) -> None:
    """Fill in the columns about blocks with the same signature, and about the nearest article. groups: (3, G) zeros,
    scratch."""
    tags, parents, block_elements = page.tags, page.parents, page.block_elements
    blocks = len(rows)
    total = max(1, sums[0, 0])
    for block in range(blocks):
        group = counts[block, GROUP]
        groups[0, group] += 1
        groups[1, group] += counts[block, CHARACTERS]
        groups[2, group] += counts[block, LINK_CHARACTERS]
    for block in range(blocks):
        group = counts[block, GROUP]
        row = rows[block]
        row[GROUP_AT] = np.log1p(groups[0, group])
        row[GROUP_AT + 1] = np.log1p(groups[1, group] / groups[0, group])
        row[GROUP_AT + 2] = groups[2, group] / max(1, groups[1, group])
        row[GROUP_AT + 3] = groups[1, group] / total
        element = block_elements[block]
        while element > 0 and tags[element] != ARTICLE:
            element = parents[element]
        row[GROUP_AT + 4] = sums[element, 3] / max(1, sums[0, 3]) if element > 0 else -1.0


@compiled
def describe_signposts(rows: np.ndarray, counts: np.ndarray, cues: np.ndarray) -> None:
    """The columns that tell how many blocks ago, and in how many, a short block announces something, such as "Comments (3)"."""
    blocks = len(rows)
    for cue in range(N_CUES):
        since = until = 99
        for block in range(blocks):
            rows[block, SINCE_AT + cue] = since
            words = counts[block, WORDS]
            since = 0 if words <= 8 and 3 * cues[block, cue] >= words and cues[block, cue] > 0 else min(99, since + 1)
        for block in range(blocks - 1, -1, -1):
            rows[block, SINCE_AT + N_CUES + cue] = until
            words = counts[block, WORDS]
            until = 0 if words <= 8 and 3 * cues[block, cue] >= words and cues[block, cue] > 0 else min(99, until + 1)


@compiled
def describe_place(
    rows: np.ndarray, counts: np.ndarray, page: Page, kind_of_tag: np.ndarray, near: np.ndarray, alike: np.ndarray, total: int
) -> None:
    """The columns about where a block stands: in the page, below which elements, after the page's first heading."""
    tags, parents, depths, block_elements = page.tags, page.parents, page.depths, page.block_elements
    blocks = len(rows)
    h1 = -1
    for block in range(blocks):
        if tags[block_elements[block]] == H1 and (h1 < 0 or counts[block, TITLE_WORDS] > counts[h1, TITLE_WORDS]):
            h1 = block
    seen = 0
    for block in range(blocks):
        element = block_elements[block]
        row = rows[block]
        row[13] = min(60, depths[element])
        row[14] = block / blocks
        row[15] = seen / total
        row[16] = 0 if h1 < 0 else (1 if block > h1 else (2 if block == h1 else -1))
        row[17] = 99 if h1 < 0 else max(-99, min(99, block - h1))
        if kind_of_tag[tags[element]] >= 0:
            row[KINDS_AT + kind_of_tag[tags[element]]] = 1
        for column in range(near.shape[1]):
            row[NEAR_AT + column] = near[element, column]
        most = 1
        for _ in range(6):
            most = max(most, alike[element])
            element = max(0, parents[element])
        row[PAGE_AT - 1] = min(50, most)
        seen += counts[block, CHARACTERS]


@compiled
def describe_surroundings(
    rows: np.ndarray, counts: np.ndarray, page: Page, sums: np.ndarray, traits: np.ndarray, total: int
) -> None:
    """The columns about what is around a block: in the elements above it, and in the blocks before and after."""
    tags, parents, block_elements = page.tags, page.parents, page.block_elements
    blocks = len(rows)
    for block in range(blocks):
        element = block_elements[block]
        row = rows[block]
        column = UP_AT
        above = element
        for _ in range(LEVELS):
            # up to the next block-level ancestor with more blocks than `inner`
            inner = above
            while above > 0 and (not traits[tags[above]] & BLOCK or sums[above, 2] == sums[inner, 2]):
                above = parents[above]
            row[column] = np.log1p(sums[above, 0])
            row[column + 1] = sums[above, 1] / max(1, sums[above, 0])
            row[column + 2] = sums[above, 0] / total
            row[column + 3] = np.log1p(sums[above, 2])
            row[column + 4] = sums[above, 3] / max(1, sums[above, 0])
            column += 5
        for offset in range(-REACH, REACH + 1):
            if offset == 0:
                continue
            other = block + offset
            if 0 <= other < blocks:
                row[column] = np.log1p(counts[other, CHARACTERS])
                row[column + 1] = counts[other, LINK_CHARACTERS] / max(1, counts[other, CHARACTERS])
                row[column + 2] = np.log1p(counts[other, ENDS])
                row[column + 3] = tags[block_elements[other]] == tags[element]
            else:
                row[column] = row[column + 1] = -1
            column += 4


@compiled
def describe_candidate(
    rows: np.ndarray,
    page: Page,
    sums: np.ndarray,
    traits: np.ndarray,
    scores: np.ndarray,
    best: int,
    best_above: np.ndarray,
    on_path: np.ndarray,
) -> None:
    """The columns about the element that most likely holds the main text; `on_path`, (N,) of zeros, is scratch."""
    tags, parents, ends, block_elements = page.tags, page.parents, page.ends, page.block_elements
    blocks = len(rows)
    element = best
    while element >= 0:
        on_path[element] = 1
        element = parents[element]
    first, last = blocks, -1
    for block in range(blocks):
        if best <= block_elements[block] < ends[best]:
            first = min(first, block)
            last = block
    for block in range(blocks):
        element = block_elements[block]
        row = rows[block]
        row[CANDIDATE_AT] = best <= element < ends[best]
        row[CANDIDATE_AT + 1] = best_above[element] / max(scores[best], 1e-9)
        apart = 0
        while not on_path[element]:
            apart += traits[tags[element]] & BLOCK != 0
            element = parents[element]
        row[CANDIDATE_AT + 2] = apart
        row[CANDIDATE_AT + 3] = sums[best, 0] / max(1, sums[0, 0])
        row[CANDIDATE_AT + 4] = max(0, min(99, first - block))
        row[CANDIDATE_AT + 5] = max(0, min(99, block - last))


def put_word_scores(rows: np.ndarray, scores: np.ndarray) -> None:
    """Fills the columns about what its words and those of its neighbours say of each block: `blocks.py`'s `scores`, (B,)."""
    padded = np.concatenate([[0, 0], scores, [0, 0]])
    for column, offset in enumerate((0, -2, -1, 1, 2)):
        rows[:, WORDS_AT + column] = padded[2 + offset : 2 + offset + len(scores)]


def features(data: np.ndarray, page: Page, word_weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`FEATURES` of each block of the page, (B, F) float32, and the counts of its text (`blocks.py`), (B, N_COUNTS) int64.

    Without `word_weights` (`blocks.py`) the scores of words are 0.
    """
    elements, blocks = len(page.tags), len(page.block_elements)
    start, end = (page.title[2], page.title[3]) if page.title[3] else (page.title[0], page.title[1])
    title = np.zeros(256, np.uint64)
    title_words(data, int(start), int(end), title)
    counts, cues = np.empty((blocks, N_COUNTS), np.int64), np.zeros((blocks, N_CUES), np.int32)
    count_text(data, page, title, CUE_KEYS, CUE_BITS, TRAITS, counts, cues)
    signatures = np.empty(blocks, np.uint64)
    sign(page, signatures)
    _, counts[:, GROUP] = np.unique(signatures, return_inverse=True)
    sums, scores = np.zeros((elements, 4), np.int64), np.zeros(elements)
    sum_over_tree(page, counts, sums)
    best = score_candidates(page, counts, sums, TRAITS, scores)
    near = np.full((elements, N_ROLES + N_TAGS), FAR, np.uint8)
    best_above, alike, scratch = np.zeros(elements), np.ones(elements, np.int64), np.zeros(elements, np.int64)
    hand_down(page, TRAITS, ANCESTOR_OF_TAG, scores, near, best_above, alike, scratch)

    rows = np.zeros((blocks, len(FEATURES)), np.float32)
    total = max(1, int(sums[0, 0]))
    block_tags = page.tags[page.block_elements]
    _, which, times = np.unique(counts[:, HASH], return_inverse=True, return_counts=True)
    is_heading = (TRAITS[block_tags] & HEADING) != 0
    headings = np.maximum.accumulate(np.where(is_heading, np.arange(blocks), -1))
    describe_text(rows, counts, cues, times[which], headings)
    describe_shape(rows, counts, page.block_media)
    if word_weights is not None:
        put_word_scores(rows, word_scores(data, page, word_weights))
    groups = np.zeros((3, int(counts[:, GROUP].max(initial=0)) + 1), np.int64)
    describe_groups(rows, counts, page, sums, groups)
    describe_signposts(rows, counts, cues)
    describe_place(rows, counts, page, KIND_OF_TAG, near, alike, total)
    describe_surroundings(rows, counts, page, sums, TRAITS, total)
    on_path = np.zeros(elements, np.uint8)
    describe_candidate(rows, page, sums, TRAITS, scores, best, best_above, on_path)
    tags = set(page.tags.tolist())
    rows[:, PAGE_AT:] = (
        np.log1p(blocks),
        np.log1p(sums[0, 0]),
        sums[0, 1] / total,
        sums[0, 3] / total,
        ARTICLE in tags,
        MAIN in tags,
        np.log1p((page.tags == ARTICLE).sum()),
        *(bool(int(page.roles[0]) & ROLE_BIT[role]) for role in PAGE_ROLES),
    )
    return rows, counts
