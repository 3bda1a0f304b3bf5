"""Character offsets of the tokens of a text.

Where the tokens' bytes are the text's own, they say it. Elsewhere (a normalizer changed the text, or tokens are words
without the white space between them) the `tokenizers` library tells, with two repairs: it gives every byte of a run of
unknown characters the whole run's span, and a space put before the text the first character's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import tokenizers
from tokenizers import models

from bessemer.tokenization.vocabulary import SPACE_MARK, byte_of_name


def spans_of_pieces(text: str, pieces: Sequence[bytes]) -> np.ndarray | None:
    """The characters [start, end), int64 (pieces, 2), of pieces that make up the text's UTF-8; None where they do not.

    They may have one space more, before the text, and spaces where it has U+2581. A piece that is a part of a character
    spans that character; a piece that is the space before the text spans nothing, (0, 0).
    """
    written = b"".join(pieces)
    for form in (text, text.replace(SPACE_MARK, " ")):
        utf8 = form.encode()
        for prefix in (b"", b" "):
            if written == prefix + utf8:
                return _spans_of_lengths(utf8, np.fromiter(map(len, pieces), np.int64, len(pieces)), len(prefix))
    return None


def _spans_of_lengths(utf8: bytes, lengths: np.ndarray, prefix: int) -> np.ndarray:
    """Spans in characters of consecutive stretches of these lengths in bytes; the first `prefix` bytes are not in the text."""
    begins_character = np.frombuffer(utf8, np.uint8) & 0xC0 != 0x80
    character_of_byte = np.cumsum(begins_character) - 1
    ends = np.cumsum(lengths) - prefix
    starts = np.maximum(ends - lengths, 0)
    characters = np.append(character_of_byte, len(begins_character) and character_of_byte[-1] + 1)
    last = np.where(ends > starts, characters[np.maximum(ends, 1) - 1] + 1, characters[starts])
    return np.stack([characters[starts], last], axis=1)


def spread_runs(text: str, names: Sequence[str], spans: np.ndarray, alone: tokenizers.Tokenizer) -> np.ndarray:
    """The library's spans, with the bytes of unknown characters that it fused given one character each.

    names: the tokens as the vocabulary writes them; spans: int64 (tokens, 2), not changed; alone: from
    `bytes_alone`, with the tokenizer's normalizer.
    """
    spans = spans.copy()
    changes = np.flatnonzero((np.diff(spans, axis=0) != 0).any(axis=1)) + 1
    for start, end in pairwise([0, *changes, len(spans)]):
        values = [byte_of_name(name) for name in names[start:end]]
        begin, stop = spans[start] if end > start else (0, 0)
        if stop - begin < 2 or None in values:
            continue
        within = alone.encode(text[begin:stop], add_special_tokens=False)
        if within.ids == values:
            spans[start:end] = np.array(within.offsets, np.int64) + begin
    return spans


def bytes_alone(normalizer: tokenizers.normalizers.Normalizer | None) -> tokenizers.Tokenizer:
    """A tokenizer whose ids are the bytes of the normalised text, and whose spans are the characters they come from."""
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    alone = tokenizers.Tokenizer(models.BPE(vocab=names, merges=[], byte_fallback=True))
    if normalizer is not None:
        alone.normalizer = normalizer
    return alone


def without_holes(spans: np.ndarray, length: int) -> np.ndarray:
    """Spans that cover a text of this length: characters between two tokens, which normalising took away, go to the
    token before them (to all that are parts of the character there), and at the beginning to the first."""
    if not len(spans):
        return spans
    starts = np.maximum.accumulate(spans[:, 0])
    starts[0] = 0
    ends = np.maximum.accumulate(np.maximum(spans[:, 1], starts))
    # of the tokens that may hold the character at an end
    last_begun = np.searchsorted(starts, ends, side="right") - 1
    next_starts = np.append(starts, length)[last_begun + 1]
    return np.stack([starts, np.where(ends[last_begun] > ends, ends, next_starts)], axis=1)
