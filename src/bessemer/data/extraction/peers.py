"""Extraction by other libraries, alone or together with ours: resiliparse, trafilatura, and a union.

Different extractors keep different pages and paragraphs, and a corpus gains from having both (arXiv 2602.19548). trafilatura
can take minutes on a hostile page, so that it runs in a process of its own that is ended when a page takes too long.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from bessemer.core.errors import ConfigError
from bessemer.data.extraction.main_text import main_text

#: Seconds that trafilatura may take for one page.
TIME_LIMIT = 10.0
_START_LIMIT = 60.0


class NoAnswerError(Exception):
    """trafilatura gave nothing for a page: it failed, or ran out of time. `kind` is the name under which that is counted."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Trafilatura:
    """trafilatura with a time limit a page.

    The process is started on the first page and again after one that had to be ended. Safe to use from several threads.
    Raises ConfigError where trafilatura is not installed.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        if find_spec("trafilatura") is None:
            raise ConfigError("extractor: trafilatura needs the package trafilatura: pip install 'bessemer[trafilatura]'")
        self.time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, html: str, url: str | None = None) -> str:
        """The text that trafilatura finds, "" where it finds none. Raises NoAnswerError when it fails or takes too long."""
        with self._lock:
            try:
                process, limit = self._started()
                assert process.stdin is not None
                asked = json.dumps({"html": html, "url": url}).encode()
                # fed by a thread: a process that hangs with a full pipe must not hang this one
                feeder = threading.Thread(target=_feed, args=(process, asked), daemon=True)
                feeder.start()
                answer = self._answer(process, time.monotonic() + limit)
                feeder.join(timeout=1.0)
                return answer
            except TimeoutError:
                self._end()
                why = f"trafilatura took more than {self.time_limit:g} s for this page"
                raise NoAnswerError("extraction_timeouts", why) from None
            except (OSError, EOFError, ValueError) as error:
                self._end()
                why = f"trafilatura's process ended on this page ({type(error).__name__})"
                raise NoAnswerError("extraction_failures", why) from None

    def close(self) -> None:
        """Ends the process; the next page would start another."""
        with self._lock:
            self._end()

    def _started(self) -> tuple[subprocess.Popen[bytes], float]:
        if self._process is not None and self._process.poll() is None:
            return self._process, self.time_limit
        command = [sys.executable, "-m", "bessemer.data.extraction.trafilatura_worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        # importing takes a while that is not the page's fault
        feeder = threading.Thread(
            target=_feed, args=(self._process, json.dumps({"html": "", "url": None}).encode()), daemon=True
        )
        feeder.start()
        self._answer(self._process, time.monotonic() + _START_LIMIT)
        return self._process, self.time_limit

    def _answer(self, process: subprocess.Popen[bytes], deadline: float) -> str:
        """One message from the process. Raises TimeoutError after the deadline, EOFError when the process is gone."""
        assert process.stdout is not None
        received, wanted = bytearray(), 8
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(received) < wanted:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                some = os.read(process.stdout.fileno(), min(1 << 16, wanted - len(received)))
                if not some:
                    raise EOFError
                received += some
                if wanted == 8 and len(received) == 8:
                    wanted += int.from_bytes(received[:8], "big")
        answer = json.loads(received[8:])
        if isinstance(answer, dict):
            raise NoAnswerError("extraction_failures", f"trafilatura failed on this page: {answer['error']}")
        return str(answer)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:
                        pass
            self._process = None


def _feed(process: subprocess.Popen[bytes], body: bytes) -> None:
    try:
        assert process.stdin is not None
        process.stdin.write(len(body).to_bytes(8, "big") + body)
        process.stdin.flush()
    except (OSError, ValueError):
        pass


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
