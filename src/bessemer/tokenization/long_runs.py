"""Encoding a run of one kind of character (a million spaces, letters without a space) in linear time and little memory.

A split regex leaves such a run in one piece, and libraries merge a piece with a heap as large as the piece. Here it is
encoded in windows that overlap. The result is exact: a sequence of tokens is the encoding of its piece if each two
neighbours are the encoding of their own bytes. (Suppose the piece's merges crossed a border of the sequence, and take the
first that does. Until then no merge crossed the borders around the two tokens at it, so alone they would have been merged
in the same order, and across their border too.) Tokens of one window up to a token that begins the next window, and then
the next window's, have only neighbours that a window had.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

#: A longer text is looked through for runs.
LONG_TEXT = 1 << 18
_WINDOW = 1 << 16
#: At the end of a window, tokens may come out otherwise than in the whole.
_OVERLAP = 1 << 11

_LETTERS = (
    "A-Za-zÀ-ÖØ-öø-ɏЀ-ҁҊ-ԯ"
    "\u05d0-\u05ea\u0620-\u064a\u0e01-\u0e30"  # Hebrew, Arabic, Thai
    "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fa5\uac00-\ud7a3"  # Japanese, Chinese, Korean
)
# ASCII punctuation but for the apostrophe, and emoji
_SYMBOLS = "!-&(-/:-@\\[-`{-~\U0001f300-\U0001f64f"
#: What a named split leaves in one piece, but for a few characters at its ends, and would end at the same place if it began
#: inside: what may not stand before, and the characters. Line ends after punctuation belong to it, and may end elsewhere
#: than by themselves.
_RUNS = [(f"[{kind}]", f"[{kind}]") for kind in (_LETTERS, _SYMBOLS, " ")] + [("[^ A-Za-z0-9]", "\n")]


class Windows:
    """Encodes texts with long runs, for a byte-level BPE without a normalizer that cuts by a named split."""

    def __init__(self, split: str, token_bytes: np.ndarray) -> None:
        """`token_bytes`: the number of bytes of each token, by id."""
        runs = [*_RUNS, ("[0-9]", "[0-9]")] if split == "gpt-2" else _RUNS
        self._runs = re.compile("|".join(f"(?<!{before}){kind}{{{4 * _WINDOW},}}" for before, kind in runs))
        self._token_bytes = token_bytes

    def encode(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray | None:
        """The ids that `encode` gives for a text, from its ids for windows of the long runs; None where it must be asked
        for the whole (there are no such runs, or two windows do not meet)."""
        pieces: list[np.ndarray] = []
        # of the next window; from the second on, where the token `meeting` begins
        start = 0
        meeting: int | None = None
        for run in self._runs.finditer(text):
            while run.end() - max(start, run.start()) > 2 * _WINDOW:
                window = text[start : max(start, run.start()) + _WINDOW]
                ids = encode(window)
                border = self._last_border(window, ids)
                if border is None or (meeting is not None and ids[0] != meeting):
                    return None
                token, character = border
                pieces.append(ids[:token])
                start, meeting = start + character, int(ids[token])
        if meeting is None:
            return None
        ids = encode(text[start:])
        return np.concatenate([*pieces, ids]) if ids[0] == meeting else None

    def _last_border(self, window: str, ids: np.ndarray) -> tuple[int, int] | None:
        """The last token that begins with a whole character before the window's overlap: its index and its first
        character's. None where there is none in the window's second half."""
        encoded = window.encode()
        borders = np.cumsum(self._token_bytes[ids])
        if not len(borders) or borders[-1] != len(encoded):
            # some bytes have no token
            return None
        last = int(np.searchsorted(borders, len(encoded) - _OVERLAP))
        for index in range(last, max(last - 64, 0), -1):
            border = int(borders[index - 1])
            if encoded[border] & 0xC0 != 0x80:
                after = len(encoded[border:].decode())
                return (index, len(window) - after) if after < _WINDOW // 2 else None
        return None
