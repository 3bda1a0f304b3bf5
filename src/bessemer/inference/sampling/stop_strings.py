"""The text of an answer as it grows, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.tokenization.streaming import StreamingDecoder
from bessemer.tokenization.tokenizer import Tokenizer


class StopStrings:
    """Passes text on, holding back only what could still become a stop string.

    The answer ends before the stop string that is complete first, or behind it with `include`, however the text is cut into
    pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops, self._include = stops, include
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that may be shown now. Once `found`, nothing more is."""
        if self.found or not self._stops:
            return "" if self.found else text
        held = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return held[: min(matches)[0 if self._include else 1]]
        keep = max(_overlap(held, stop) for stop in self._stops)
        shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return shown

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)


class AnswerText:
    """Token ids to the text that may be shown: whole characters, no control tokens, nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool = False) -> None:
        self._decoder = StreamingDecoder(tokenizer)
        self._stops = StopStrings(stops, include_stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found

    def feed(self, token: int) -> str:
        """The text that this token lets through."""
        return self._stops.feed(self._decoder.feed([token]))

    def flush(self) -> str:
        """What is left when no more tokens come."""
        return self._stops.feed(self._decoder.flush()) + self._stops.flush()
