"""A file compressor as a baseline of bits per byte."""

from __future__ import annotations

import lzma
from collections.abc import Sequence


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of `xz -9` on the documents, joined by line breaks; the bytes are the documents' own.

    The compressor is adaptive: unlike a model or an n-gram it has no training text, and unlike them it has seen all documents
    before the present one. It is a familiar reference, not a comparison on equal terms.
    """
    compressed = lzma.compress(b"\n".join(documents), preset=9)
    return 8 * len(compressed) / sum(map(len, documents))
