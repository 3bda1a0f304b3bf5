"""The bytes of each token, for every kind of vocabulary of `tokenizer.json`, and the characters that tokens span.

A vocabulary writes bytes as text in its own way, and the file's decoder says which: byte-level BPE in GPT-2's 256 characters,
SentencePiece with `▁` for a space and `<0xE2>` for a byte, WordPiece with `##` inside a word. For every kind, a text is the
concatenation of its tokens' bytes; only the first token may have other bytes than later in a text, without a leading space.

Character offsets are computed from the tokens' bytes where these are the text's own. Elsewhere (a normalizer changed the text,
or tokens are words without the white space between them) they are those of the `tokenizers` library, with two corrections: the
library gives every byte of a run of unknown characters the whole run's span, and a space put before the text the span of the
first character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import models

from bessemer.core.errors import ArtefactError

Kind = Literal["byte-level", "sentencepiece", "wordpiece", "words", "characters"]

#: How SentencePiece writes a space.
SPACE_MARK = "\u2581"

_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")

#: Replacements that the WordPiece decoder of the `tokenizers` library makes in a word and the space before it when `cleanup` is
#: on, in its order, without the two rules that need a space after the word.
_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of tokens by id: `later[id]`, or at the beginning of a text `first[id]` where the two differ.

    gaps: ids below the largest that no token has. They decode to nothing.
    """

    kind: Kind
    later: Sequence[bytes]
    first: Mapping[int, bytes]
    gaps: Collection[int]

    def text_bytes(self, ids: Sequence[int], beginning: bool) -> bytes:
        """The bytes of ids that are no gaps; `beginning` where they begin a text."""
        if beginning and ids and ids[0] in self.first:
            return self.first[ids[0]] + b"".join(map(self.later.__getitem__, ids[1:]))
        return b"".join(map(self.later.__getitem__, ids))


def byte_name(byte: int) -> str:
    """The name of a byte's token in vocabularies with byte fallback: `<0xE2>`."""
    return f"<0x{byte:02X}>"


def byte_of_name(name: str) -> int | None:
    """The byte that an entry like `<0xE2>` stands for, or None."""
    match = _BYTE_NAME.fullmatch(name)
    return None if match is None else int(match[1], 16)


def read_vocabulary(
    tokens: Mapping[str, int], added: Mapping[int, str], decoder: Mapping[str, Any] | None, model: str
) -> Vocabulary:
    """The vocabulary of a tokenizer with these entries and added tokens, whose kind the file's `decoder` tells.

    An added token stands for its own text. Raises ArtefactError for a decoder that is none of the kinds we know.
    """
    names: list[str | None] = [None] * (max(tokens.values()) + 1)
    for name, id in tokens.items():
        names[id] = name
    steps = steps_of(decoder)
    types = [step["type"] for step in steps]
    if types in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _of_pieces("byte-level", names, added, _byte_level)
    if types == ["WordPiece"]:
        return _of_words("wordpiece", names, steps[0]["prefix"], steps[0]["cleanup"])
    if not types and model == "WordLevel":
        return _of_words("words", names, None, cleanup=False)
    if _joins_pieces(steps):
        mark = next((_space_mark(step) for step in steps if step["type"] in ("Replace", "Metaspace")), None)
        read_name = partial(_piece, space_mark=mark, read_bytes="ByteFallback" in types)
        vocabulary = _of_pieces("sentencepiece" if mark else "characters", names, added, read_name)
        return replace(vocabulary, first=_without_space(vocabulary.later, names, added, steps))
    raise ArtefactError(
        f"a {model} tokenizer with the decoder {' + '.join(types) or 'null'} is of a kind that is not read; those that are: "
        "byte-level, SentencePiece (Replace or Metaspace, ByteFallback, Fuse, Strip), WordPiece, WordLevel without a "
        "decoder, characters (ByteFallback, Fuse)"
    )


def steps_of(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a `normalizer`, `pre_tokenizer` or `decoder` section, nested sequences included, in their order."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    inner = section.get("normalizers") or section.get("pretokenizers") or section.get("decoders") or []
    return [step for part in inner for step in steps_of(part)]


def _joins_pieces(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a decoder concatenates tokens: marks become spaces, bytes are decoded, and one leading space may be dropped."""
    types = [step["type"] for step in steps]
    if types[-2:] == ["Fuse", "Strip"]:
        strip = steps[-1]
        if (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0):
            return False
        types.pop()
    if types[-1:] == ["Fuse"]:
        types.pop()
    if len(types) > len(set(types)) or not steps or not set(types) <= {"Replace", "Metaspace", "ByteFallback"}:
        return False
    return not {"Replace", "Metaspace"} <= set(types) and all(
        "String" in step["pattern"] and step["content"] == " " for step in steps if step["type"] == "Replace"
    )


def _space_mark(step: Mapping[str, Any]) -> str:
    mark: str = step["replacement"] if step["type"] == "Metaspace" else step["pattern"]["String"]
    return mark


def _without_space(
    later: Sequence[bytes], names: Sequence[str | None], added: Mapping[int, str], steps: Sequence[Mapping[str, Any]]
) -> dict[int, bytes]:
    """Bytes of tokens at the beginning of a text: without the space that encoding puts there (SentencePiece's dummy prefix).

    One space is removed, as by SentencePiece and by the library's `Strip`. The library's `Metaspace` removes every space of the
    first token, and so spaces that the text had.
    """
    if any(step["type"] == "Strip" for step in steps):
        return {id: piece[1:] for id, piece in enumerate(later) if piece.startswith(b" ")}
    if any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps):
        marked = {id for id, name in enumerate(names) if name and byte_of_name(name) is None and id not in added}
        return {id: later[id][1:] for id in marked if later[id].startswith(b" ")}
    return {}


def _of_pieces(
    kind: Kind, names: Sequence[str | None], added: Mapping[int, str], read_name: Callable[[str], bytes]
) -> Vocabulary:
    later = [b"" if name is None else added[id].encode() if id in added else read_name(name) for id, name in enumerate(names)]
    return Vocabulary(kind, later, {}, _gaps(names))


def _of_words(kind: Kind, names: Sequence[str | None], continues: str | None, cleanup: bool) -> Vocabulary:
    """Words with a space before them, but for those that begin with `continues`; at the beginning, all as written."""
    later: list[bytes] = []
    first: dict[int, bytes] = {}
    for id, name in enumerate(names):
        if name is None:
            later.append(b"")
            continue
        inside = name.removeprefix(continues) if continues and name.startswith(continues) else f" {name}"
        later.append(_cleaned(inside, cleanup))
        first[id] = _cleaned(name, cleanup)
    return Vocabulary(kind, later, first, _gaps(names))


def _gaps(names: Sequence[str | None]) -> frozenset[int]:
    return frozenset(id for id, name in enumerate(names) if name is None)


def _byte_level(name: str) -> bytes:
    try:
        return token_from_name(name)
    except KeyError:
        # not all its characters stand for bytes, so it is its own text, as in `tokenizers`
        return name.encode()


def _piece(name: str, space_mark: str | None, read_bytes: bool) -> bytes:
    byte = byte_of_name(name) if read_bytes else None
    if byte is not None:
        return bytes([byte])
    return (name if space_mark is None else name.replace(space_mark, " ")).encode()


def _cleaned(text: str, cleanup: bool) -> bytes:
    for old, new in _CLEANUP if cleanup else ():
        text = text.replace(old, new)
    return text.encode()


@cache
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in the vocabulary, GPT-2's table: a printable byte is itself, the
    others are the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def vocabulary_name(token: bytes) -> str:
    """The vocabulary entry of a token's bytes."""
    return "".join(map(byte_characters().__getitem__, token))


def token_from_name(name: str) -> bytes:
    """The bytes of a vocabulary entry. Raises KeyError when it has other characters than those of bytes."""
    return bytes(map(_bytes_of_characters().__getitem__, name))


@cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def spans_of_pieces(text: str, pieces: Sequence[bytes]) -> np.ndarray | None:
    """The characters [start, end), int64 (pieces, 2), of pieces that make up the text's UTF-8; None where they do not.

    The pieces may have a space before the text, and spaces where the text has U+2581. A piece that is part of a character spans
    that character; a piece that is the space before the text has the span (0, 0).
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


def spread_runs(text: str, names: Sequence[str], spans: np.ndarray, byte_spans: tokenizers.Tokenizer) -> np.ndarray:
    """The library's spans, corrected where it gives all bytes of a run of unknown characters the whole run's span: each byte
    gets the character that it comes from.

    names: the tokens as the vocabulary writes them. spans: int64 (tokens, 2), not changed. byte_spans: a `byte_tokenizer` with
    the tokenizer's normalizer.
    """
    spans = spans.copy()
    changes = np.flatnonzero((np.diff(spans, axis=0) != 0).any(axis=1)) + 1
    for start, end in pairwise([0, *changes, len(spans)]):
        values = [byte_of_name(name) for name in names[start:end]]
        begin, stop = spans[start] if end > start else (0, 0)
        if stop - begin < 2 or None in values:
            continue
        within = byte_spans.encode(text[begin:stop], add_special_tokens=False)
        if within.ids == values:
            spans[start:end] = np.array(within.offsets, np.int64) + begin
    return spans


def byte_tokenizer(normalizer: tokenizers.normalizers.Normalizer | None) -> tokenizers.Tokenizer:
    """A tokenizer whose ids are the bytes of the normalised text, with the spans of the characters that they come from."""
    tokenizer = tokenizers.Tokenizer(models.BPE({byte_name(byte): byte for byte in range(256)}, merges=[], byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def without_holes(spans: np.ndarray, length: int) -> np.ndarray:
    """Spans that cover a text of this length. Characters between two tokens, which normalising removed, are added to the token
    before them (to several if they are parts of one character); those at the beginning to the first token."""
    if not len(spans):
        return spans
    starts = np.maximum.accumulate(spans[:, 0])
    starts[0] = 0
    ends = np.maximum.accumulate(np.maximum(spans[:, 1], starts))
    # of each token, the last that begins at or before its end
    last_begun = np.searchsorted(starts, ends, side="right") - 1
    next_starts = np.append(starts, length)[last_begun + 1]
    return np.stack([starts, np.where(ends[last_begun] > ends, ends, next_starts)], axis=1)
