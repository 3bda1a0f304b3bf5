"""Passages with what stands around them: neighbours in their document, or the section that they are a part of.

A joined text is made of whole passages; what two of them share stands once, and a line names the headings where they change.
Its segments say which of its characters stand in the document, and where, so that quotes and citations keep their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from bessemer.retrieval.store import HEADINGS_BETWEEN, Passage, PassagePlace, Segment

#: Most bytes of a character in UTF-8.
_WIDEST = 4


class Places(Protocol):
    """Where the passages of a document stand (`LanceStore`)."""

    def places_of(self, document: str) -> list[PassagePlace]: ...

    def of_document(self, document: str, numbers: Sequence[int]) -> list[Passage]: ...


def joined(passages: Sequence[Passage], main: Passage, headings: str | None = None) -> Passage:
    """Passages of a document, in order, as one with the identity, page and box of `main`.

    headings: those that all are below, which stand above the text; None: those of `main`. A line before the first passage of
    others names these.
    """
    above = main.headings if headings is None else headings
    text, end = "", passages[0].start
    segments: list[Segment] = []
    last = above
    for one in passages:
        raw = one.text.encode()
        new = raw[max(0, end - one.start) :].decode(errors="ignore")
        if one.headings != last:
            line = one.headings.removeprefix(f"{above}{HEADINGS_BETWEEN}") if above else one.headings
            text += ("\n\n" if text else "") + (f"# {line}\n\n" if line else "")
        elif text and one.start > end:
            text += "\n\n"
        begin = one.start + len(raw) - len(new.encode())
        if segments and begin == end and segments[-1].text_end == len(text):
            segments[-1] = segments[-1]._replace(text_end=len(text) + len(new))
        elif new:
            segments.append(Segment(len(text), len(text) + len(new), begin))
        text += new
        end, last = max(end, one.end), one.headings
    is_plain = len(segments) == 1 and segments[0].text_start == 0
    return replace(
        main,
        headings=above,
        text=text,
        start=passages[0].start,
        end=end,
        table_header=passages[0].table_header,
        segments=() if is_plain else tuple(segments),
    )


def with_neighbours(store: Places, passage: Passage, neighbours: int) -> Passage:
    """A passage with as many before and after it in its document."""
    numbers = range(max(0, passage.number - neighbours), passage.number + neighbours + 1)
    return joined(store.of_document(passage.document, numbers), passage)


def with_section(store: Places, passage: Passage, most: int) -> Passage:
    """A passage with its section: all that stands below its headings, or, where that is the passage alone, below the first of
    the headings above that hold more.

    most: characters. Of a longer section of its own the passages around it come as far as they fit; it stays alone where
    the section of a heading above is longer. Without headings the document is the section.
    """
    around = [
        place
        for place in store.places_of(passage.document)
        # a section that reaches further has more characters than are wanted
        if place.end > passage.start - _WIDEST * most and place.start < passage.end + _WIDEST * most
    ]
    path = passage.headings
    while len(section := _run(around, passage.number, path)) == 1 and path:
        path = path.rpartition(HEADINGS_BETWEEN)[0]
    texts = {one.number: one for one in store.of_document(passage.document, [place.number for place in section])}

    def of(first: int, last: int) -> Passage:
        return joined([texts[number] for number in range(first, last + 1)], passage, path)

    first, last = min(texts), max(texts)
    whole = of(first, last)
    if len(whole.text) <= most:
        return whole
    if path != passage.headings:
        return passage
    return _widest(of, passage.number, first, last, most) or passage


def _run(places: Sequence[PassagePlace], number: int, path: str) -> list[PassagePlace]:
    """The passages without a gap around one that stand below a path of headings."""
    below = {
        place.number: place
        for place in places
        if not path or place.headings == path or place.headings.startswith(f"{path}{HEADINGS_BETWEEN}")
    }
    first = last = number
    while first - 1 in below:
        first -= 1
    while last + 1 in below:
        last += 1
    return [below[one] for one in range(first, last + 1)]


def _widest(of: Callable[[int, int], Passage], number: int, first: int, last: int, most: int) -> Passage | None:
    """The passages around one, after and before it in turn, as far as they fit; None where none does."""
    begin = end = number
    found: Passage | None = None
    sides = {1, -1}
    while sides:
        for side in (1, -1):
            wider = (begin, end + 1) if side == 1 else (begin - 1, end)
            if side in sides and first <= wider[0] and wider[1] <= last and len((tried := of(*wider)).text) <= most:
                (begin, end), found = wider, tried
            else:
                sides.discard(side)
    return found
