"""The tokenizer inside a GGUF file, as a Hugging Face folder.

A GGUF holds the tokens by id, their types, and the merges of byte-level BPE (`gpt2`) or the scores of SentencePiece's BPE
(`llama`) and Unigram (`t5`). It names the split regex without holding it, and has no Unicode normalisation: the folder encodes
as llama.cpp does.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Container, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError
from bessemer.tokenization.folder import (
    BYTE_LEVEL_DECODER,
    AddedToken,
    TokenizerContent,
    TokenizerParts,
    bpe_model,
    learned_size,
)
from bessemer.tokenization.formats.gguf_metadata import read_metadata
from bessemer.tokenization.sentencepieces import merges_of, meta_to_spaces, spaces_to_meta
from bessemer.tokenization.split import APPROXIMATED_REGEXES, OTHER_NAMES, SPLIT_REGEXES, pre_tokenizer
from bessemer.tokenization.vocabulary import byte_characters

#: llama.cpp requires a merge in a byte-level tokenizer. These two characters stand for no byte, so this one never applies.
NO_MERGES = ["\u2400", "\u2401"]
#: Splits with which llama.cpp writes a piece that is a token as that token, whatever the merges.
WHOLE_PIECES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})
#: llama.cpp's tokenizers that are not read, and why.
_REFUSED = {
    "bert": "WordPiece, and the file does not say how text is normalised",
    "rwkv": "RWKV's longest match, which tokenizer.json has no model for",
    "plamo2": "PLaMo's own, which tokenizer.json has no model for",
    "gemma4": "BPE on characters with rules of its own, which tokenizer.json of the model has and the file has not",
    "no_vocab": "the file holds no vocabulary",
    "none": "the file holds no vocabulary",
}


class TokenType(IntEnum):
    """What a token is, by llama.cpp's numbers (`tokenizer.ggml.token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def import_gguf(path: Path, split: str | None = None) -> TokenizerContent:
    """Read the tokenizer of a GGUF file, ids kept.

    split: name of the split regex, for a file that names none or one unknown here. Raises ArtefactError for a file that
    is damaged, has no tokenizer, or one of a kind that a `tokenizer.json` cannot be made of.
    """
    return _Gguf(path).tokenizer(split)


def unpacked(path: Path) -> TemporaryDirectory[str]:
    """The tokenizer of a GGUF file as a folder, until it is cleaned up. Raises as `import_gguf`."""
    scratch = TemporaryDirectory()
    import_gguf(path).write(Path(scratch.name), compact=True)
    return scratch


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value < 1 << 31


def _is_list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


_KINDS_BY_NAME: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(["model", "pre"], ("a text", _is_text)),
    **dict.fromkeys(["tokens", "merges"], ("a list of texts", _is_list_of(_is_text))),
    "scores": ("a list of numbers", _is_list_of(_is_number)),
    **dict.fromkeys(["token_type", "precompiled_charsmap"], ("a list of whole numbers", _is_list_of(_is_id))),
    **dict.fromkeys(
        ["bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"], ("the number of a token", _is_id)
    ),
    **dict.fromkeys(
        ["add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"],
        ("true or false", lambda value: value in (0, 1)),
    ),
}
#: Key → what its value must be, in words, and the check of a value.
_KINDS = {f"tokenizer.ggml.{name}": kind for name, kind in _KINDS_BY_NAME.items()} | {
    "tokenizer.chat_template": ("a text", _is_text)
}


class _Gguf:
    """The metadata of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = read_metadata(path)
        for key, (what, is_one) in _KINDS.items():
            if (value := self._values.get(key)) is not None and not is_one(value):
                raise ArtefactError(f"{path}: the key {key!r} should be {what}, got {reprlib.repr(value)}")
        self.tokens: list[str] = self.get("tokens", [])
        self.types: list[int] = self.get("token_type", [int(TokenType.NORMAL)] * len(self.tokens))

    def get(self, name: str, default: Any = None) -> Any:
        """The value under `tokenizer.ggml.NAME`."""
        return self.value(f"tokenizer.ggml.{name}", default)

    def value(self, key: str, default: Any = None) -> Any:
        """The value under a key."""
        return self._values.get(key, default)

    def tokenizer(self, split: str | None) -> TokenizerContent:
        """The tokenizer. Raises ArtefactError with the reason why it cannot be read."""
        kind = self.get("model")
        if kind is None or (not self.tokens and kind not in _REFUSED):
            raise ArtefactError(f"{self.path}: this GGUF file holds no tokenizer")
        if len(self.types) != len(self.tokens):
            raise ArtefactError(f"{self.path}: {len(self.tokens):,} tokens and {len(self.types):,} token types")
        if kind == "gpt2":
            return self._byte_level(split)
        if kind == "llama":
            return self._sentencepiece_bpe()
        if kind == "t5":
            return self._unigram()
        reason = _REFUSED.get(kind, "unknown here")
        raise ArtefactError(
            f"{self.path}: its tokenizer is of the kind {kind!r} and is not read ({reason}); read: gpt2, llama, t5"
        )

    def _byte_level(self, split: str | None) -> TokenizerContent:
        name = split or self.get("pre")
        known = OTHER_NAMES.get(name or "", name)
        splits = [*SPLIT_REGEXES, *APPROXIMATED_REGEXES]
        if known not in splits:
            what = f"the split {name!r} of this tokenizer is not known here" if name else "the file names no split regex"
            hint = nearest(name, splits) if name else ""
            raise ArtefactError(f"{self.path}: {what}{hint}; give one with --split: {', '.join(splits)}")
        added = self._added()
        size = learned_size(len(self.tokens), added)
        parts = TokenizerParts(
            size=size,
            model=bpe_model(
                self.tokens[:size],
                [pair for merge in self.get("merges") or [] if (pair := merge.split(" ")) != NO_MERGES],
                ignore_merges=name in WHOLE_PIECES,
            ),
            pre_tokenizer=pre_tokenizer(known),
            decoder=BYTE_LEVEL_DECODER,
        )
        notes = notes_of_split(known) + notes_of_bytes(parts.model["vocab"])
        return self._with_roles(parts, added, notes, add_bos=known in ("llama-bpe", "tekken"))

    def _sentencepiece_bpe(self) -> TokenizerContent:
        added = self._added(unk=0, bos=1, eos=2)
        size = learned_size(len(self.tokens), added)
        prefix = bool(self.get("add_space_prefix", True))
        scores = self._scores()
        pieces = {token: scores[id] for id, token in enumerate(self.tokens) if self.types[id] == TokenType.NORMAL}
        parts = TokenizerParts(
            size=size,
            model=bpe_model(
                self.tokens[:size],
                merges_from_scores(pieces),
                unk_token=self._text(self.get("unknown_token_id", 0)),
                byte_fallback=TokenType.BYTE in self.types,
            ),
            pre_tokenizer=None,
            normalizer=spaces_to_meta(prefix=prefix),
            decoder=meta_to_spaces(prefix=prefix),
        )
        notes = notes_of_controls(self.tokens, self.types)
        return self._with_roles(parts, added, notes, add_bos=True, bos=1, eos=2, unk=0)

    def _unigram(self) -> TokenizerContent:
        added = self._added(unk=2, eos=1, pad=0)
        size = learned_size(len(self.tokens), added)
        scores = self._scores()
        learned = [id for id in range(size) if self.types[id] in (TokenType.NORMAL, TokenType.UNUSED)]
        lowest = min((scores[id] for id in learned), default=0.0)
        # tokenizers matches every entry in the text, llama.cpp only learned ones: the others must score below the
        # characters that they are made of
        vocab = [
            [token, scores[id] if self.types[id] in (TokenType.NORMAL, TokenType.UNUSED) else lowest * (len(token) + 1)]
            for id, token in enumerate(self.tokens[:size])
        ]
        prefix, merged = bool(self.get("add_space_prefix", False)), bool(self.get("remove_extra_whitespaces", False))
        charsmap = self.get("precompiled_charsmap")
        unk = int(self.get("unknown_token_id", 2))
        fallback = TokenType.BYTE in self.types
        notes = ("llama.cpp writes a character outside the vocabulary as the unknown token, this folder as its bytes",)
        parts = TokenizerParts(
            size=size,
            model={"type": "Unigram", "unk_id": unk, "vocab": vocab, "byte_fallback": fallback},
            pre_tokenizer=None,
            normalizer=spaces_to_meta(prefix=prefix or merged, merge=merged, charsmap=_as_bytes(charsmap)),
            decoder=meta_to_spaces(prefix=prefix or merged),
        )
        return self._with_roles(parts, added, notes if fallback else (), add_eos=True, eos=1, unk=2, pad=0)

    def _scores(self) -> list[float]:
        scores = self.get("scores")
        if scores is None or len(scores) != len(self.tokens):
            raise ArtefactError(f"{self.path}: a tokenizer of this kind needs a score for each token, and they are missing")
        return [float(score) for score in scores]

    def _text(self, id: int | None) -> str | None:
        return self.tokens[id] if id is not None and 0 <= id < len(self.tokens) else None

    def _added(self, **defaults: int) -> dict[int, AddedToken]:
        """The added tokens by id: by their types, and those that the file gives a role."""
        added = {
            id: AddedToken(id, token, special=kind != TokenType.USER_DEFINED)
            for id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        }
        for role, key in _ROLES.items():
            id = self.get(key, defaults.get(role))
            text = self._text(id)
            if text is not None:
                added[id] = AddedToken(id, text, True)
        return dict(sorted(added.items()))

    def _with_roles(
        self,
        parts: TokenizerParts,
        added: dict[int, AddedToken],
        notes: Sequence[str] = (),
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        **defaults: int,
    ) -> TokenizerContent:
        return TokenizerContent(
            parts=parts,
            added=tuple(added.values()),
            roles={f"{role}_token": self._text(self.get(key, defaults.get(role))) for role, key in _ROLES.items()},
            add_bos=bool(self.get("add_bos_token", add_bos)),
            add_eos=bool(self.get("add_eos_token", add_eos)),
            chat_template=self.value("tokenizer.chat_template"),
            notes=tuple(notes),
        )


_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def notes_of_split(split: str) -> list[str]:
    """A note on a split that llama.cpp cuts differently from the models that it is named after."""
    if split in APPROXIMATED_REGEXES:
        return [f"llama.cpp cuts the split {split} otherwise at combining marks: text that holds them gets other ids there"]
    return []


def notes_of_bytes(vocab: Container[str]) -> list[str]:
    """A note on a byte-level vocabulary that lacks bytes."""
    missing = [byte for byte, name in enumerate(byte_characters()) if name not in vocab]
    if not missing:
        return []
    which = ", ".join(f"0x{byte:02X}" for byte in missing[:6]) + (", …" if len(missing) > 6 else "")
    return [
        f"{len(missing)} of the 256 bytes have no token ({which}): they vanish from a text that holds them, and their "
        "neighbours may merge here and not in llama.cpp"
    ]


def notes_of_controls(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """A note on SentencePiece's BPE in llama.cpp, which joins two neighbours also when they form a control token."""
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}

    def can_be_joined(token: str) -> bool:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        return any(all(len(half) == 1 or half in pieces for half in pair) for pair in halves)

    others = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
    joined = [token for token, kind in zip(tokens, types, strict=True) if kind in others and can_be_joined(token)]
    if not joined:
        return []
    return [f"typed in a text, {', '.join(joined[:5])} can become the token of that name in llama.cpp; here it stays text"]


def merges_from_scores(scores: Mapping[str, float]) -> list[list[str]]:
    """The merges of SentencePiece's BPE by rank, from the score of each piece: the best is joined first."""
    return merges_of(sorted(scores, key=lambda piece: -scores[piece]))


def _as_bytes(numbers: Sequence[int] | None) -> bytes | None:
    return bytes(number & 0xFF for number in numbers) if numbers else None
