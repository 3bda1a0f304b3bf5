"""Hash of a text, the column `text_hash`: of one text, and compiled of a batch."""

from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.hashing import hash_bytes
from bessemer.data.text.characters import SPACE, character_classes
from bessemer.data.text.compiled import compiled
from bessemer.data.text.texts import Texts
from bessemer.data.text.utf8 import code_point

_BLANK, _DELETE = 0x20, 0x7F


def hash_text(text: str) -> str:
    """128-bit hash, hexadecimal, of the text in NFC with runs of white space as one space and none at the ends."""
    return hash_bytes(" ".join(unicodedata.normalize("NFC", text).split()).encode())


def hash_texts(array: pa.Array) -> list[str]:
    """`hash_text` of each of N strings. Only those that Unicode's composition would change go through Python's own strings."""
    texts = Texts.from_arrow(array)
    written = np.empty(int(texts.offsets[-1] - texts.offsets[0]), np.uint8)
    ends, is_ascii = np.zeros(len(texts) + 1, np.int64), np.zeros(len(texts), np.bool_)
    _single_spaced(texts.data, texts.offsets, character_classes(), written, ends, is_ascii)
    hashes, content = [], written.data
    for number, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        if not is_ascii[number]:
            text = array[number].as_py()
            if not unicodedata.is_normalized("NFC", text):
                hashes.append(hash_text(text))
                continue
        hashes.append(hash_bytes(content[start:end]))
    return hashes


def rehashed(before: pa.Array, after: pa.Array, hashes: pa.Array) -> pa.Array:
    """The column `text_hash` of edited texts: `hashes` stay where the text does, without the heading that some texts have."""
    is_new = pc.not_equal(before, after)
    return pc.replace_with_mask(hashes, is_new, pa.array(hash_texts(after.filter(is_new)), pa.string()))


@compiled
def _single_spaced(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, written: np.ndarray, ends: np.ndarray, is_ascii: np.ndarray
) -> None:
    """Write each text with runs of white space as one space and none at its ends, and where it ends."""
    index = 0
    for text in range(len(offsets) - 1):
        at, end, begin = offsets[text], offsets[text + 1], index
        seen, waits = 0, False
        while at < end:
            code, length = code_point(data, at)
            seen |= code
            if classes[code] & SPACE:
                waits = index > begin
                at += length
                continue
            if waits:
                written[index] = _BLANK
                index, waits = index + 1, False
            # a word's bytes as they are
            while True:
                written[index] = data[at]
                index, at = index + 1, at + 1
                if at == end or not (_BLANK < data[at] < _DELETE or data[at] & 0xC0 == 0x80):
                    break
        is_ascii[text] = seen < 0x80
        ends[text + 1] = index
