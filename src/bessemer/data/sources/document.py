"""Document of a source, before it has an id, a split and a place in a file; and the tally of what could not be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: Kinds of what is set aside that are nothing of a file's content: a network's failures, a function's.
FAILURES = frozenset({"broken_streams", "failed_functions"})

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

    def set_aside(self, kind: str, place: str, why: str) -> None:
        """Count something that was left out under `kind`, and name its place with the reason in one line."""
        self.counts[kind] += 1
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(" ".join(f"{place}: {why}".split()))

    def take(self, other: Tally) -> None:
        """Add what another tally holds, and empty it."""
        self.files += other.files
        self.bytes += other.bytes
        self.counts.update(other.counts)
        self.notes += other.notes[: max(_MOST_NOTES - len(self.notes), 0)]
        other.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.files = self.bytes = 0
        self.counts.clear()
        self.notes.clear()
