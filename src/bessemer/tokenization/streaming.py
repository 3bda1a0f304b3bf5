"""Streaming decoder: token ids to text as they arrive, in whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from bessemer.tokenization.tokenizer import Tokenizer


class StreamingDecoder:
    """Decodes a growing sequence of token ids.

    What `feed` has returned so far, followed by `flush()`, equals `tokenizer.decode` of all the ids. Bytes that can
    still become a character are held back until the rest of it arrives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, goes_on: bool = False) -> None:
        """goes_on: the ids follow others of the same text, so that a blank before the first word is kept."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._beginning = not goes_on

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        shown = self._tokenizer.shown(ids, self._skip_special)
        if self._beginning:
            new = self._tokenizer.decode_bytes(shown, skip_special=False)
        else:
            new = b"".join(map(self._tokenizer.token_bytes, shown))
        self._beginning = self._beginning and not shown
        return self._decoder.decode(new)

    def flush(self) -> str:
        """The withheld rest at the end: U+FFFD for an incomplete character, else empty."""
        self._beginning = True
        return self._decoder.decode(b"", final=True)
