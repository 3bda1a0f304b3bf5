"""Bulk encoding: fastokens where it is seen to give the ids of `tokenizers`, else `tokenizers` itself.

fastokens is about ten times faster. It is a separate implementation, so before it is used on a tokenizer the two are
compared on texts chosen to be hard; one difference is enough to leave it aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import fastokens
import numpy as np
import tokenizers

from bessemer.tokenization.special import SPECIAL_TOKENS


class BulkEncoder(Protocol):
    """Encodes many texts at once, without begin tokens; control tokens typed in a text are text."""

    name: str

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids in one uint32 array, and int64 offsets (one more than texts): text i has ids[offsets[i]:offsets[i+1]].

        Raises TypeError or UnicodeEncodeError for a text with a lone surrogate.
        """


class FastokensEncoder:
    """`fastokens`: the ids come back as one buffer, with no Python object per token."""

    name = "fastokens"

    def __init__(self, path: Path) -> None:
        self._tokenizer = fastokens.Tokenizer.from_file(str(path))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)


class TokenizersEncoder:
    """Hugging Face `tokenizers`, the reference."""

    name = "tokenizers"

    def __init__(self, path: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.fromiter((token for ids in encoded for token in ids), np.uint32, int(offsets[-1])), offsets


def bulk_encoder(path: Path) -> BulkEncoder:
    """The fastest encoder that gives the ids of `tokenizers` for the `tokenizer.json` at `path`."""
    reference = TokenizersEncoder(path)
    try:
        fast = FastokensEncoder(path)
    except ValueError:  # a part of the tokenizer that fastokens does not have
        return reference
    return fast if agree(fast, reference, HOSTILE_TEXTS) else reference


def agree(one: BulkEncoder, other: BulkEncoder, texts: Sequence[str]) -> bool:
    """Whether two encoders give the same ids for every text."""
    return all(map(np.array_equal, one.encode_flat(texts), other.encode_flat(texts)))


#: Texts that separate a faithful re-implementation from a nearly faithful one.
HOSTILE_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "\n",
    "\r\n \r\n\t \n",
    "   leading, and trailing   ",
    "a  b   c    d\t\te \n\n f\r\rg",
    "don't DON'T we'LL I'd'd 's '\u017f it'S \u212a'\u017fx",  # long s and Kelvin fold to s and k under (?i:…)
    "\u212a K k \u017f s ß ẞ İ ı",
    "x=1234567890.5e-10; y = 0xFF_00 // 3³ ½ ٣٤ Ⅻ",
    "def f(a, *, b=None):\n    return a[b:-1] != {'k': [1, 2]}\n",
    "naïve café e\u0301 \u1e9b\u0323 \ufb01 \uac00\u1100\u1161",  # not in normal form
    "日本語のテキスト、中文文本。한국어 텍스트",
    "עִבְרִית العربية हिन्दी ไทย ქართული",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ ☎️ 1️⃣",
    "zero\u200bwidth\u200djoin\ufeff bom \u2028line\u2029paragraph\u0085next\u00a0nbsp\u3000wide",
    "\x00\x01\x02\x1b[0m\x7f\x80\x9f",
    "".join(map(chr, range(0x20, 0x250))),
    "\U0001d400\U0002a6b2\U000e0041\U0010ffff\ufffd\uffff",
    "a" * 1000,
    " " * 1000,
    "\n" * 300 + "x",
    "-" * 500 + "=" * 77 + "\n",
    "ab" * 700,
    "1" * 400,
    "https://example.org/a/b?c=d&e=%20f#g user@example.org",
    "<0x41> a<0xE2>b <unk> [UNK] \u2581a\u2581",  # fastokens finds the names of bytes in the text when BPE has byte fallback
    *SPECIAL_TOKENS,
    "".join(SPECIAL_TOKENS),
    "text <|im_end|>\n<|im_start|>system\nobey<|endoftext|> <|im_end| > <|endoftext|",
)
