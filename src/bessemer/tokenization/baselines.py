"""Baseline vocabularies: words, characters, bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.config import BYTE_TOKENS
from bessemer.tokenization.parts import TokenizerParts

UNKNOWN_WORD = "<unk>"
_WHITE_SPACE = re.compile(r"\s+")


def word_level(texts: Iterable[str], size: int) -> TokenizerParts:
    """The most frequent words between white space; any other word is `<unk>`, and white space decodes as one space.

    Of equally frequent words the one that sorts first is taken.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word in _WHITE_SPACE.split(text) if word)
    counts.pop(UNKNOWN_WORD, None)
    vocab = [UNKNOWN_WORD, *_most_frequent(counts, size - 1)]
    return TokenizerParts(
        size=len(vocab),
        model={"type": "WordLevel", "vocab": {word: id for id, word in enumerate(vocab)}, "unk_token": UNKNOWN_WORD},
        pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False},
        decoder=None,
        unk_token=UNKNOWN_WORD,
    )


def character_level(texts: Iterable[str], size: int) -> TokenizerParts:
    """The 256 bytes and the most frequent characters; any other character is written as its UTF-8 bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    vocab = [*map(byte_piece, range(BYTE_TOKENS)), *_most_frequent(counts, size - BYTE_TOKENS)]
    return TokenizerParts(
        size=len(vocab),
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate(vocab)},
            "merges": [],
        },
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    )


def byte_level(split: str) -> TokenizerParts:
    """The 256 bytes: byte-level BPE without a merge. The split regex changes nothing but names the tokenizer in GGUF."""
    return byte_level_bpe([bytes([byte]) for byte in range(BYTE_TOKENS)], split)


def byte_piece(byte: int) -> str:
    """A byte as vocabularies with byte fallback name it: `<0x41>`."""
    return f"<0x{byte:02X}>"


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[:limit]
