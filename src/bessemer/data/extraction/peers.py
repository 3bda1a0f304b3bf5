"""Extraction by other libraries, alone or together with ours: resiliparse, trafilatura, and a union.

Different extractors keep different pages and paragraphs, and a corpus gains from having both (arXiv 2602.19548). trafilatura
can take minutes on a hostile page, so that it runs in processes of its own that are ended when a page takes too long.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from bessemer.core.environment import usable_cores
from bessemer.core.errors import ConfigError
from bessemer.core.packages import install_extra
from bessemer.data.extraction.main_text import main_text
from bessemer.data.limited import Limited, RefusedError

#: Seconds of processor time that trafilatura may take for one page.
TIME_LIMIT = 10.0
_FUNCTION = "bessemer.data.extraction.trafilatura_worker:trafilatura_text"


class NoAnswerError(Exception):
    """trafilatura gave nothing for a page: it failed, or took too long. `kind` is the name under which that is counted."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Trafilatura:
    """trafilatura with a limit on a page's processor time, in as many processes as pages are asked for at once.

    At most `processes` of them, by default one a core; they are started when they are needed. Safe to use from several threads.
    Raises ConfigError where trafilatura is not installed.
    """

    def __init__(
        self,
        time_limit: float = TIME_LIMIT,
        processes: int | None = None,
        function: Callable[[str, str | None], str] | str = _FUNCTION,
    ) -> None:
        if find_spec("trafilatura") is None:
            raise ConfigError(f"extractor: trafilatura needs the package trafilatura: {install_extra('trafilatura')}")
        self.time_limit = time_limit
        self._helpers = [Limited(function, time_limit) for _ in range(processes or usable_cores())]
        # the last one is taken first, so that no more are started than are needed
        self._free: queue.LifoQueue[Limited] = queue.LifoQueue()
        for helper in self._helpers:
            self._free.put(helper)

    def __call__(self, html: str, url: str | None = None) -> str:
        """The text that trafilatura finds, "" where it finds none. Raises NoAnswerError when it fails or takes too long."""
        helper = self._free.get()
        try:
            return str(helper(html, url))
        except RefusedError as error:
            kind = "extraction_timeouts" if error.kind == "timed_out" else "extraction_failures"
            raise NoAnswerError(kind, f"trafilatura: {error}") from None
        finally:
            self._free.put(helper)

    def close(self) -> None:
        """Ends the processes; the next page would start another."""
        for helper in self._helpers:
            helper.close()


@cache
def shared_trafilatura() -> Trafilatura:
    """The one that `extract` uses in this process."""
    return Trafilatura()


def resiliparse_text(html: str) -> str:
    """What resiliparse takes for the main content."""
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, main_content=True, alt_texts=False, links=False))


def union(ours: str, theirs: str) -> str:
    """Our text with every paragraph of theirs that it lacks, each behind the one it follows there; none of it twice.

    Paragraphs are compared by their letters and digits alone, so that a list marker or a space makes no difference.
    """
    paragraphs = ours.split("\n\n") if ours else []
    whole = "\n".join(letters(paragraph) for paragraph in paragraphs)
    place = {letters(line): number for number, paragraph in enumerate(paragraphs) for line in paragraph.split("\n")}
    added: dict[int, list[str]] = {}
    seen: set[str] = set()
    anchor = -1
    for line in theirs.split("\n"):
        compared = letters(line)
        if not compared:
            continue
        if compared in place:
            anchor = place[compared]
        elif compared not in whole and compared not in seen:
            seen.add(compared)
            added.setdefault(anchor, []).append(line.strip())
    result = list(added.get(-1, []))
    for number, paragraph in enumerate(paragraphs):
        result += [paragraph, *added.get(number, [])]
    return "\n\n".join(result)


def extract_with(
    html: str, *, url: str | None, extractor: str, on_failure: Callable[[NoAnswerError], None] | None = None
) -> str:
    """The text by `resiliparse`, `trafilatura` or `union` (ours and trafilatura's).

    on_failure: called when trafilatura gives no answer, which is taken for no text.
    """
    if extractor == "resiliparse":
        return resiliparse_text(html)
    try:
        theirs = shared_trafilatura()(html, url)
    except NoAnswerError as error:
        theirs = ""
        if on_failure is not None:
            on_failure(error)
    return theirs if extractor == "trafilatura" else union(main_text(html.encode("utf-8", "replace")), theirs)


def letters(text: str) -> str:
    """The letters and digits of a text, by which texts of different extractors are compared."""
    return "".join(character for character in text.lower() if character.isalnum())
