"""Bulk encoding: fastokens where a check finds that it gives the ids of `tokenizers`, else `tokenizers` itself.

fastokens is about ten times faster. It is a separate implementation, so before it is used on a tokenizer the two are compared
on texts chosen to be hard; a single difference rules it out.

A long run of one kind of character (a million spaces, letters without a space) is one piece for a split regex, and libraries
merge a piece with a heap as large as the piece. `Windows` encodes it in windows that overlap, in linear time and little memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import fastokens
import numpy as np
import tokenizers

from bessemer.tokenization.control_tokens import SPECIAL_TOKENS
from bessemer.tokenization.split import SPLIT_REGEXES, split_name

#: A longer text is encoded in parts, on all cores and in little memory.
_CHARACTERS_PER_PART = 1 << 16

#: Where every split regex cuts, whatever stands around: between an ASCII letter and a digit or punctuation (no apostrophe,
#: which may begin a contraction), and before a space that follows a character other than white space.
_CERTAIN_CUT = re.compile(r"(?<=[A-Za-z])(?=[0-9!-&(-/:-@\[-`{-~])|(?<=\S)(?= )")

#: An apostrophe and a long s. `tokenizers` takes it for the contraction 's, by Unicode's case folding; fastokens does not.
_LONG_S = "'\u017f"

#: Characters encoded at once: `tokenizers` allocates some 200 bytes of objects per token.
_CHARACTERS_AT_ONCE = 1 << 20


class BulkEncoder(Protocol):
    """Encodes many texts at once, without begin tokens; control tokens typed in a text are text."""

    name: str

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids in one uint32 array, and int64 offsets (one more than texts): text i has ids[offsets[i]:offsets[i+1]].

        Raises TypeError or UnicodeEncodeError for a text with a lone surrogate.
        """


class TokenizersEncoder:
    """Hugging Face `tokenizers`, the reference."""

    name = "tokenizers"

    def __init__(self, path: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.split = certain_split(self._tokenizer)
        self.added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    @cached_property
    def windows(self) -> Windows | None:
        """The encoder of very long runs; None for a tokenizer for which it is not known to be exact."""
        if self.split not in SPLIT_REGEXES or not isinstance(self._tokenizer.model, tokenizers.models.BPE):
            return None
        lengths = np.zeros(self._tokenizer.get_vocab_size(), np.int64)
        for token, id in self._tokenizer.get_vocab().items():
            lengths[id] = len(token)
        return Windows(self.split, lengths)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts, firsts = in_parts(texts, self.split is not None)
        encoded = [ids for batch in batches(parts) for ids in self._encode(batch)]
        return _joined(encoded, firsts)

    def _encode(self, batch: list[str]) -> list[np.ndarray]:
        if len(batch[-1]) > LONG_TEXT and self.windows is not None:
            # a long text ends its batch
            ids = self.windows.encode(batch[-1], lambda text: self._plainly([text])[0])
            if ids is not None:
                return [*self._plainly(batch[:-1]), ids]
        return self._plainly(batch)

    def _plainly(self, batch: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


class FastokensEncoder:
    """`fastokens`: the ids come back as one buffer, with no Python object per token.

    Texts that it is known to cut differently go to `tokenizers`.
    """

    name = "fastokens"

    def __init__(self, path: Path, reference: TokenizersEncoder | None = None) -> None:
        """Raises ValueError for a tokenizer with a part that fastokens does not have."""
        self._tokenizer = fastokens.Tokenizer.from_file(str(path))
        self._reference = reference or TokenizersEncoder(path)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts, firsts = in_parts(texts, self._reference.split is not None)
        alone = {index: ids for index, part in enumerate(parts) if (ids := self._alone(part)) is not None}
        ids, offsets = self._plainly(["" if index in alone else part for index, part in enumerate(parts)] if alone else parts)
        if not alone:
            return ids, offsets[firsts]
        encoded = [ids[start:end] for start, end in pairwise(offsets)]
        return _joined([alone.get(index, some) for index, some in enumerate(encoded)], firsts)

    def _plainly(self, parts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(parts, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)

    def _alone(self, part: str) -> np.ndarray | None:
        """The ids of a text that must be encoded outside the batch; None for any other."""
        if _LONG_S in part:
            return self._reference.encode_flat([part])[0]
        if len(part) > LONG_TEXT and self._reference.windows is not None:
            return self._reference.windows.encode(part, lambda text: self._plainly([text])[0])
        return None


def in_parts(texts: Sequence[str], cut: bool) -> tuple[list[str], np.ndarray]:
    """The texts, long ones cut into parts where the split regex cuts anyway, and the index of each text's first part (one more
    entry than texts). A text's ids are the concatenated ids of its parts."""
    if not cut or max(map(len, texts), default=0) <= _CHARACTERS_PER_PART:
        return list(texts), np.arange(len(texts) + 1)
    parts, firsts = [], [0]
    for text in texts:
        start = 0
        while len(text) - start > _CHARACTERS_PER_PART:
            cut_at = _CERTAIN_CUT.search(text, start + _CHARACTERS_PER_PART)
            if cut_at is None:
                break
            parts.append(text[start : cut_at.start()])
            start = cut_at.start()
        parts.append(text[start:])
        firsts.append(len(parts))
    return parts, np.array(firsts)


def slices(text: str) -> list[tuple[int, int]]:
    """Start and end of slices of about `_CHARACTERS_PER_PART` characters, cut at spaces where possible."""
    bounds, start = [], 0
    while len(text) - start > 2 * _CHARACTERS_PER_PART:
        cut = text.find(" ", start + _CHARACTERS_PER_PART, start + 2 * _CHARACTERS_PER_PART)
        end = cut if cut >= 0 else start + _CHARACTERS_PER_PART
        bounds.append((start, end))
        start = end
    return [*bounds, (start, len(text))]


def certain_split(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The tokenizer's named split; None unless the parts of `in_parts` have the same ids as in the whole text. A normalizer, or
    an added token that is matched in text, could reach across a cut."""
    if tokenizer.pre_tokenizer is None or tokenizer.normalizer is not None:
        return None
    if not all(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        return None
    return split_name(json.loads(tokenizer.pre_tokenizer.__getstate__()))


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about `_CHARACTERS_AT_ONCE` characters. A text longer than `LONG_TEXT` ends its batch."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE or len(text) > LONG_TEXT:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _joined(encoded: Sequence[np.ndarray], firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    ids = np.concatenate(encoded) if encoded else np.empty(0, np.uint32)
    return ids, offsets[firsts]


def bulk_encoder(path: Path) -> BulkEncoder:
    """The fastest encoder that gives the ids of `tokenizers` for the `tokenizer.json` at `path`, on texts chosen to be hard
    and on the tokenizer's own added tokens."""
    reference = TokenizersEncoder(path)
    try:
        fast = FastokensEncoder(path, reference)
    except ValueError:
        # fastokens lacks a part of the tokenizer
        return reference
    return fast if agree(fast, reference, [*HOSTILE_TEXTS, *around_added_tokens(reference.added)]) else reference


def around_added_tokens(added: Sequence[str]) -> list[str]:
    """Texts in which added tokens stand alone, side by side, and with and without space around them."""
    return ["".join(added), " ".join(added), "\n".join(f"a{token}b  {token}\t{token}" for token in added), *added[:100]]


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
    "don't DON'T we'LL I'd'd 's '\u017f '\u017fo it'S \u212a'\u017fx",  # long s and Kelvin fold to s and k under (?i:…)
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


#: Characters above which a text is searched for long runs.
LONG_TEXT = 1 << 18
_WINDOW = 1 << 16
#: Bytes at a window's end whose tokens are not used: they may differ from those of the whole text.
_OVERLAP = 1 << 11

_LETTERS = (
    "A-Za-zÀ-ÖØ-öø-ɏЀ-ҁҊ-ԯ"
    "\u05d0-\u05ea\u0620-\u064a\u0e01-\u0e30"  # Hebrew, Arabic, Thai
    "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fa5\uac00-\ud7a3"  # Japanese, Chinese, Korean
)
# ASCII punctuation but for the apostrophe, and emoji
_SYMBOLS = "!-&(-/:-@\\[-`{-~\U0001f300-\U0001f64f"
#: Runs that a named split leaves in one piece, except for a few characters at the ends, and that end at the same place if the
#: split begins inside them: what must not precede the run, and its characters. A line end after punctuation belongs to the
#: punctuation and may end elsewhere.
_RUNS = [(f"[{kind}]", f"[{kind}]") for kind in (_LETTERS, _SYMBOLS, " ")] + [("[^ A-Za-z0-9]", "\n")]


class Windows:
    """Encodes texts with long runs, for a byte-level BPE without a normalizer that cuts by a named split."""

    def __init__(self, split: str, token_bytes: np.ndarray) -> None:
        """`token_bytes`: the number of bytes of each token, by id."""
        runs = [*_RUNS, ("[0-9]", "[0-9]")] if split == "gpt-2" else _RUNS
        self._runs = re.compile("|".join(f"(?<!{before}){kind}{{{4 * _WINDOW},}}" for before, kind in runs))
        self._token_bytes = token_bytes

    def encode(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray | None:
        """The ids of a text, by `encode` on overlapping windows of its long runs. None where `encode` must take the whole text:
        it has no long run, or two windows disagree where they meet."""
        pieces: list[np.ndarray] = []
        # start of the next window, where the last used token of the one before, `meeting`, begins
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
        """The last token before the overlap that begins with a whole character: its index and its first character's. None when
        there is none in the window's second half."""
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
