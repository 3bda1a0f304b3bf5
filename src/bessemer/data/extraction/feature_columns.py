"""Columns of a row of features: their names, in order, and where each kind of them begins."""

from __future__ import annotations

import numpy as np

from bessemer.data.extraction.tags import NUMBER, TRAITS
from bessemer.data.extraction.vocabulary import CUES, ROLE_BIT, ROLES

#: Kinds of elements whose distance above a block is a feature.
_ANCESTOR_TAGS = (
    "nav", "header", "footer", "aside", "article", "main", "form", "figure", "ul", "ol",
    "dl", "table", "blockquote", "section", "p", "pre", "details",
)  # fmt: skip
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
#: Roles that the class of the whole page may name.
PAGE_ROLES = ("article", "forum", "teaser", "product")
#: How far up the surroundings are measured, in block-level ancestors.
LEVELS = 4
#: How many blocks before and after are looked at.
REACH = 3
FAR = 40

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
    *(f"since_{cue}" for cue in CUES),
    *(f"until_{cue}" for cue in CUES),
    *(
        f"{what}_{level}"
        for level in range(1, LEVELS + 1)
        for what in ("chars_up", "links_up", "share_up", "blocks_up", "prose_up")
    ),
    *(
        f"{what}_{place}"
        for place in [*range(-REACH, 0), *range(1, REACH + 1)]
        for what in ("chars_at", "links_at", "ends_at", "same_at")
    ),
    "function_share",
    "symbol_share",
    "strong_share",
    "slanted_share",
    "media_before",
    "media_after",
    *(f"first_{cue}" for cue in CUES),
    "group_blocks",
    "group_characters",
    "group_links",
    "group_share",
    "article_share",
    *(f"word_score_{place}" for place in ("here", -2, -1, 1, 2)),
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
    "page_articles",
    *(f"page_is_{role}" for role in PAGE_ROLES),
)

KIND_OF_TAG = np.full(len(TRAITS), -1, np.int64)
for _number, _kind in enumerate(_TAG_KINDS):
    for _name in _kind:
        if _name in NUMBER:
            KIND_OF_TAG[NUMBER[_name]] = _number
ANCESTOR_OF_TAG = np.full(len(TRAITS), -1, np.int64)
for _number, _name in enumerate(_ANCESTOR_TAGS):
    ANCESTOR_OF_TAG[NUMBER[_name]] = _number
H1, ARTICLE, MAIN = NUMBER["h1"], NUMBER["article"], NUMBER["main"]
N_ROLES, N_TAGS = len(ROLES), len(_ANCESTOR_TAGS)


def _mask(*names: str) -> int:
    return sum(ROLE_BIT[name] for name in names)


GOOD = _mask("body", "article", "main", "forum", "product", "lead")
BAD = _mask(
    "comment", "navigation", "breadcrumb", "footer", "sidebar", "related", "share", "advertising", "consent", "author_box",
    "subscribe", "popup", "pagination", "search", "signature",
)  # fmt: skip
# Where groups of columns begin.
KINDS_AT = FEATURES.index(f"is_{_TAG_KINDS[0][0]}")
NEAR_AT = FEATURES.index(f"role_{next(iter(ROLES))}")
CUES_AT = FEATURES.index(f"cue_{next(iter(CUES))}")
SINCE_AT = FEATURES.index(f"since_{next(iter(CUES))}")
UP_AT = FEATURES.index("chars_up_1")
SHAPE_AT = FEATURES.index("function_share")
GROUP_AT = FEATURES.index("group_blocks")
WORDS_AT = FEATURES.index("word_score_here")
CANDIDATE_AT = FEATURES.index("candidate_in")
PAGE_AT = FEATURES.index("page_blocks")
