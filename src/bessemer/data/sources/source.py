"""Protocol of a source: documents, units, positions from which reading resumes; licences as SPDX identifiers.

A *unit* is a file, an archive, or a bundle of small files. Units are read independently, in any order and in parallel. Inside
a unit every document comes with the position behind it; `read(unit, position, …)` resumes there without repeating the work
before it. Positions are the source's own (a byte offset, a record, a row): whole numbers that only grow within a unit, from 0.

A document here has no id, split or place in a file yet. A `Tally` counts what could not be read. Licences are recognised by
addresses, by `SPDX-License-Identifier` lines and by their texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress

#: Kinds of losses that are no fault of a file: failures of a network or of a user's function.
FAILURES = frozenset({"broken_streams", "failed_functions"})

#: A text that is not UTF-8 and was read all the same.
OTHER_ENCODING = "files_in_other_encodings"
#: A table whose columns are separated by another sign than its suffix says.
OTHER_DELIMITER = "tables_with_other_delimiters"
#: A file in a folder, of a kind that the source does not read.
OTHER_KIND = "files_of_other_kinds"
#: Kinds that are no loss: what was read all the same, mended or cut, and what is no document by its nature.
NO_LOSS = frozenset(
    {
        *(OTHER_ENCODING, OTHER_DELIMITER, "blank_rows"),
        *("undecodable_bytes", "files_with_undecodable_bytes", "undecodable_pages"),
        *("nul_characters", "files_with_nul_characters", "cut_paragraphs", "cut_documents"),
        *("rows_without_text", "messages_without_text", "redirects", "records_that_are_not_pages"),
        *("pages_of_other_namespaces", "questions_below_the_score", "opted_out", "links", "files_without_license"),
        *("files_that_are_no_paper", "answers_beyond_the_limit", "posts_beyond_the_limit"),
        *("generated_files", "minified_files", "vendored_files", "binary_files"),
    }
)

#: Losses of a source that the end of a run names, unless it asks for more.
FIRST_LOSSES = 3
#: Most notes that are kept; beyond it cases are counted and not named, so that memory stays bounded.
_MOST_NOTES = 1000
#: Robots that gather for training alone: what is said to one of them holds for training in general.
TRAINING_ROBOTS = ("GPTBot", "CCBot", "Google-Extended", "anthropic-ai", "ClaudeBot", "Applebot-Extended")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it was found.

    `locator` names it within its source and never changes, so that its id does not either. `heading` is put above
    the text, but two documents with the same text under different headings are duplicates. Documents of one `group`
    (a package, a file) share a split; None makes the document its own group. What its author said against its use is
    in the metadata as `opt_out`.
    """

    locator: str
    text: str
    heading: str = ""
    url: str | None = None
    license: str | None = None
    language: str | None = None
    group: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def encodable(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, replaced by `?`."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


@dataclass
class Tally:
    """Counts and notes of what a source read that is no document."""

    files: int = 0
    bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    #: The first notes of what could not be read, and how many are kept.
    losses: list[str] = field(default_factory=list)
    most_losses: int = FIRST_LOSSES

    def set_aside(self, kind: str, place: str, why: str) -> None:
        """Count something that was left out under `kind`, and name its place with the reason in one line."""
        self.counts[kind] += 1
        note = " ".join(f"{place}: {why}".split())
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(note)
        if kind not in NO_LOSS and len(self.losses) < self.most_losses:
            self.losses.append(note)

    def take(self, other: Tally) -> None:
        """Add what another tally holds, and empty it."""
        self.files += other.files
        self.bytes += other.bytes
        self.counts.update(other.counts)
        self.notes += other.notes[: max(_MOST_NOTES - len(self.notes), 0)]
        self.losses += other.losses[: max(self.most_losses - len(self.losses), 0)]
        other.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.files = self.bytes = 0
        self.counts.clear()
        self.notes.clear()
        self.losses.clear()


#: A document and the position behind it.
PositionedDocument = tuple[int, Document]


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a source that is read as one.

    `name` is unique within the source and stays the same while the source's content does. `files` are what it is read
    from, by their stable names. Plain values throughout, so that a unit can be sent to another process or machine.
    """

    name: str
    size_bytes: int
    files: tuple[tuple[str, Place], ...] = ()


class Source(Protocol):
    """Something that yields documents. Implementations are frozen and can be pickled."""

    def units(self, progress: Progress | None = None) -> list[Unit]:
        """The parts, in a stable order. What has to be fetched first is fetched here and reported to `progress`. Raises
        SourceError when what the settings name does not exist or holds nothing."""

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        """The documents of a unit behind the position `start`, each with the position behind itself. What cannot be read is
        counted and named in `tally`; it never ends the run."""

    def fingerprint(self) -> Any:
        """What the documents depend on beyond the settings, as a JSON value for the stage's key."""


def counted(documents: Callable[[Tally], Iterator[Document]], start: int, tally: Tally) -> Iterator[PositionedDocument]:
    """Positions for what can only be read from its beginning: how many documents came. The first `start` are read over,
    and what is met among them is not tallied again."""
    met = Tally()
    for position, document in enumerate(documents(met), start=1):
        if position > start:
            tally.take(met)
            yield position, document
        else:
            met.clear()
    tally.take(met)


_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/(zero|mark)/(\d\.\d))", re.I)
_ADDRESSES = (
    (re.compile(r"opensource\.org/licen[sc]es?/mit\b", re.I), "MIT"),
    (re.compile(r"opensource\.org/licen[sc]es?/bsd-([23])-clause", re.I), r"BSD-\1-Clause"),
    (re.compile(r"apache\.org/licenses/license-2\.0", re.I), "Apache-2.0"),
    (re.compile(r"mozilla\.org/.*mpl/2\.0", re.I), "MPL-2.0"),
    (re.compile(r"gnu\.org/licenses/(?:old-licenses/)?(a|l|)gpl-(\d\.\d)", re.I), r"\1GPL-\2"),
    (re.compile(r"gnu\.org/(?:copyleft|licenses)/fdl", re.I), "GFDL"),
    (re.compile(r"arxiv\.org/licenses/nonexclusive-distrib/1\.0", re.I), "LicenseRef-arXiv-nonexclusive-1.0"),
)
#: Each address of a known licence contains one of these.
LICENSE_HOSTS = (
    b"creativecommons.org/",
    b"opensource.org/",
    b"apache.org/",
    b"mozilla.org/",
    b"gnu.org/",
    b"arxiv.org/licenses",
)
_SPDX = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+()_ -]{2,100})")
#: The expression ends where a comment's closing sign begins.
_EXPRESSION = re.compile(r"\(?[A-Za-z0-9.+-]+\)?(?: (?:AND|OR|WITH) \(?[A-Za-z0-9.+-]+\)?)*")

#: Phrases that only one licence has, all of them needed; the first match counts, so narrower ones come first.
_TEXTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("EPL-2.0", ("eclipse public license", "v 2.0")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("BSL-1.0", ("boost software license", "version 1.0")),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("CC-BY-NC-SA-4.0", ("attribution-noncommercial-sharealike 4.0",)),
    ("CC-BY-NC-4.0", ("attribution-noncommercial 4.0",)),
    ("CC-BY-SA-4.0", ("attribution-sharealike 4.0",)),
    ("CC-BY-4.0", ("attribution 4.0 international",)),
    ("PSF-2.0", ("python software foundation license",)),
    ("Unlicense", ("free and unencumbered software released into the public domain",)),
    ("Zlib", ("this software is provided 'as-is'", "altered source versions must be plainly marked")),
    ("MIT-0", ("permission is hereby granted, free of charge", "mit no attribution")),
    ("X11", ("permission is hereby granted, free of charge", "name of the x consortium")),
    ("MIT", ("permission is hereby granted, free of charge", "the above copyright notice and this permission notice")),
    ("BSD-4-Clause", ("redistribution and use in source and binary forms", "all advertising materials")),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "endorse or promote")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms", "this list of conditions")),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",)),
    ("ISC", ("permission to use, copy, modify, and distribute this software for any purpose with or without fee",)),
    ("WTFPL", ("do what the fuck you want to public license",)),
)


def license_of_address(address: str) -> str | None:
    """The licence that a link leads to; None for an address that is not known to be a licence's."""
    if match := _CREATIVE_COMMONS.search(address):
        kind, version, public, public_version = match.groups()
        if kind:
            return f"CC-{kind.upper()}-{version}"
        return f"CC0-{public_version}" if public.lower() == "zero" else f"CC-PDM-{public_version}"
    for pattern, identifier in _ADDRESSES:
        if match := pattern.search(address):
            return match.expand(identifier).upper() if "GPL" in identifier else match.expand(identifier)
    return None


def stated_license(head: bytes) -> str | None:
    """The expression of a file's `SPDX-License-Identifier` line, looked for in its first bytes."""
    match = _SPDX.search(head)
    expression = _EXPRESSION.match(match[1].decode("ascii").strip()) if match else None
    return expression[0] if expression else None


def license_of_text(text: str) -> str | None:
    """The licence whose text this is, by phrases of it; None where it is none that is known."""
    plain = " ".join(text[:20_000].lower().replace("“", "'").replace("”", "'").replace('"', "'").split())
    return next((identifier for identifier, phrases in _TEXTS if all(phrase in plain for phrase in phrases)), None)
