"""Token ids to text as they arrive, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from bessemer.tokenization.tokenizer import Tokenizer


class StreamingDecoder:
    """Decodes a growing sequence of token ids.

    What `feed` has returned so far, followed by `flush()`, equals `tokenizer.decode` of all the ids. Bytes that can
    still become a character are held back until the rest of it arrives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._skip_special))

    def flush(self) -> str:
        """What is held back, at the end: U+FFFD for a character that never got its last byte, else nothing."""
        return self._decoder.decode(b"", final=True)
