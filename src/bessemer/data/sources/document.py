"""Document of a source, before it has an id, a split and a place in a file; and the tally of what could not be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: Kinds of what is set aside that are nothing of a file's content: a network's failures, a function's.
FAILURES = frozenset({"broken_streams", "failed_functions"})

#: A text that is not UTF-8 and was read all the same.
OTHER_ENCODING = "files_in_other_encodings"
#: A table whose columns are separated by another sign than its suffix says.
OTHER_DELIMITER = "tables_with_other_delimiters"
#: A file in a folder, of a kind that the source does not read.
OTHER_KIND = "files_of_other_kinds"
#: Kinds of what was read all the same, mended or cut, and of what is not a document by its nature: no loss.
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

#: The losses of a source that the end of a run names.
FIRST_LOSSES = 3
#: More notes than a person reads; beyond it things are counted and no longer named, so that memory stays bounded.
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
    """What a source met on its way that is not a document but should be reported."""

    files: int = 0
    bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    #: The first notes of what could not be read.
    losses: list[str] = field(default_factory=list)

    def set_aside(self, kind: str, place: str, why: str) -> None:
        """Count something that was left out under `kind`, and name its place with the reason in one line."""
        self.counts[kind] += 1
        note = " ".join(f"{place}: {why}".split())
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(note)
        if kind not in NO_LOSS and len(self.losses) < FIRST_LOSSES:
            self.losses.append(note)

    def take(self, other: Tally) -> None:
        """Add what another tally holds, and empty it."""
        self.files += other.files
        self.bytes += other.bytes
        self.counts.update(other.counts)
        self.notes += other.notes[: max(_MOST_NOTES - len(self.notes), 0)]
        self.losses += other.losses[: max(FIRST_LOSSES - len(self.losses), 0)]
        other.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.files = self.bytes = 0
        self.counts.clear()
        self.notes.clear()
        self.losses.clear()
