"""What a web page says about its pictures: `<img>` and `<picture>` with their texts, and `<figcaption>`.

A page names a picture in several sizes and places: `srcset`, `src`, and the attributes of scripts that load it late. All are
kept, the largest first, since a saved page has one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import NamedTuple

from bessemer.data.sources.source import license_of_address

#: Attributes under which scripts keep the address of a picture that they load late, before those that browsers read.
_SETS = ("data-srcset", "data-lazy-srcset", "srcset")
_ADDRESSES = ("data-src", "data-original", "data-lazy-src", "src")
_CANDIDATE = re.compile(r"\s*,*\s*(\S*[^\s,])(?:\s+([\d.]{1,12})([wxh]))?[^\S,]*(?:\s+[\d.]+h)?\s*(?:,|$)")
#: Most pictures of a page, and characters of a text about one.
_MOST_PICTURES, _LONGEST = 2000, 20_000


class PageText(NamedTuple):
    """A text about a picture, and where it stood."""

    text: str
    kind: str


@dataclass(frozen=True)
class MentionedPicture:
    """A picture of a page. addresses: as they are written, the first preferred. caption, alt, title: plain text, each "" where
    there is none. license: that of its figure."""

    addresses: tuple[str, ...]
    caption: str = ""
    alt: str = ""
    title: str = ""
    license: str | None = None

    @property
    def texts(self) -> list[PageText]:
        """The texts that there are, the one that says most first."""
        given = (self.caption, "figcaption"), (self.alt, "alt"), (self.title, "title")
        return [PageText(text, kind) for text, kind in given if text]


@dataclass(frozen=True)
class PagePictures:
    """The pictures of a page in their order. base: what its addresses are relative to, as the page says; "" where it does
    not."""

    pictures: list[MentionedPicture]
    base: str


def pictures_of_page(page: bytes) -> PagePictures:
    """The pictures that a page in UTF-8 shows."""
    reader = _Reader()
    reader.feed(page.decode("utf-8", errors="replace"))
    reader.close()
    reader.end_figures()
    return PagePictures([one.mentioned() for one in reader.found], reader.base)


def largest_first(srcset: str) -> list[str]:
    """The addresses of a `srcset`, by falling width or density; a comma may stand in an address, not at its end."""
    candidates = [
        (float(size) if size and size.count(".") < 2 and size != "." else 1.0, address)
        for address, size, _ in _CANDIDATE.findall(srcset[: _LONGEST * 4])
    ]
    return [address for _, address in sorted(candidates, key=lambda one: -one[0])]


@dataclass
class _Found:
    addresses: tuple[str, ...]
    alt: str
    title: str
    caption: str = ""
    license: str | None = None

    def mentioned(self) -> MentionedPicture:
        return MentionedPicture(self.addresses, self.caption, self.alt, self.title, self.license)


@dataclass
class _Figure:
    pictures: list[_Found] = field(default_factory=list)
    caption: list[str] = field(default_factory=list)
    license: str | None = None
    in_caption: bool = False


class _Reader(HTMLParser):
    """Collects pictures; what is no HTML it reads as browsers do, or passes over."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[_Found] = []
        self.base = ""
        self._figures: list[_Figure] = []
        #: Sets of the `<source>` elements of an open `<picture>`.
        self._sets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self._picture({name: value or "" for name, value in attrs})
        elif tag == "picture":
            self._sets = []
        elif tag == "source":
            self._sets += [value for name, value in attrs if name in _SETS and value]
        elif tag == "figure":
            self._figures.append(_Figure())
        elif tag == "figcaption" and self._figures:
            self._figures[-1].in_caption = True
        elif tag == "base" and not self.base:
            self.base = next((value for name, value in attrs if name == "href" and value), "")
        elif tag in ("a", "link") and self._figures:
            said = dict(attrs)
            if {"license", "licence"} & set((said.get("rel") or "").lower().split()):
                self._figures[-1].license = license_of_address(said.get("href") or "")
        elif tag in ("br", "p", "div", "li"):
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "figcaption" and self._figures:
            self._figures[-1].in_caption = False
        elif tag == "figure" and self._figures:
            self._end_figure(self._figures.pop())
        elif tag == "picture":
            self._sets = []
        elif tag in ("p", "div", "li"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if self._figures and self._figures[-1].in_caption:
            self._figures[-1].caption.append(data)

    def end_figures(self) -> None:
        """End what the page has left open."""
        while self._figures:
            self._end_figure(self._figures.pop())

    def _picture(self, said: dict[str, str]) -> None:
        if len(self.found) >= _MOST_PICTURES:
            return
        sets = [*self._sets, *(said[name] for name in _SETS if name in said)]
        given = [address for srcset in sets for address in largest_first(srcset)]
        given += [said[name].strip() for name in _ADDRESSES if said.get(name, "").strip()]
        # what stands in the page itself may be a placeholder of what scripts load
        given.sort(key=lambda address: address.startswith("data:"))
        if given:
            found = _Found(tuple(dict.fromkeys(given)), plain(said.get("alt", "")), plain(said.get("title", "")))
            self.found.append(found)
            if self._figures:
                self._figures[-1].pictures.append(found)

    def _end_figure(self, figure: _Figure) -> None:
        # of several pictures it is not said which one a caption is about
        caption = plain("".join(figure.caption)) if len(figure.pictures) == 1 else ""
        for picture in figure.pictures:
            picture.caption, picture.license = caption, figure.license


def plain(text: str) -> str:
    """A text in one line, within bounds."""
    return " ".join(text[:_LONGEST].split())
