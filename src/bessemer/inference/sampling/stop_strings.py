"""Stop strings: the text of a completion as it grows, cut at the first of them."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, holding back only what could still become a stop string.

    The text ends before the stop string that is complete first, or behind it with `include`, however it is cut into chunks.
    What is fed with `search=False` completes none: of a stop string, the end has to come later.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False
        #: The stop string that ended the text.
        self.matched = ""

    def feed(self, text: str, *, search: bool = True) -> str:
        """The text that may be shown now. Once `found`, nothing more is. search: whether a stop string may end in this text."""
        if self.found or not self._stops:
            return "" if self.found else text
        held = self._held + text
        if search:
            # what was held back before is no end of a stop string: it was searched, or was not to be
            searched = len(self._held) + 1
            places = ((stop, held.find(stop, max(searched - len(stop), 0))) for stop in self._stops)
            matches = [(at + len(stop), at, stop) for stop, at in places if at >= 0]
            if matches:
                end, at, self.matched = min(matches)
                self.found = True
                self._held = ""
                return held[: end if self._include else at]
        keep = max(overlap(held, stop) for stop in self._stops)
        shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return shown

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
