"""A tokenizer's folder as the tokenizer keys of a GGUF file, so that llama.cpp encodes as the folder does.

A tokenizer that llama.cpp has no equal for is refused with the reason; a difference on rare text becomes a note.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from bessemer.core.errors import ArtefactError
from bessemer.core.store import new_file, read_json
from bessemer.tokenization.control_tokens import TURN_ENDS
from bessemer.tokenization.folder import TOKENIZER_FILE, read_chat_template
from bessemer.tokenization.formats.gguf_import import (
    NO_MERGES,
    WHOLE_PIECES,
    TokenType,
    merges_from_scores,
    notes_of_bytes,
    notes_of_controls,
    notes_of_split,
)
from bessemer.tokenization.formats.huggingface import read_roles
from bessemer.tokenization.sentencepieces import MERGE_SPACES, WORD
from bessemer.tokenization.split import SPLIT_REGEXES, split_name
from bessemer.tokenization.vocabulary import SPACE_MARK, byte_of_name, steps_of

if TYPE_CHECKING:
    import gguf

#: Below every score that a learned token can have.
_LAST = -1e6


@dataclass
class GgufTokenizer:
    """The values of a GGUF's tokenizer keys.

    model: llama.cpp's tokenizer: gpt2, llama (SentencePiece's BPE) or t5 (Unigram). pre: the split's name, gpt2 only.
    notes: where llama.cpp encodes differently, a sentence each.
    """

    model: str
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    charsmap: bytes | None = None
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    add_bos: bool = False
    add_eos: bool = False
    ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a file that is being written."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.charsmap:
            writer.add_precompiled_charsmap(self.charsmap)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.model == "t5":
            writer.add_remove_extra_whitespaces(self.remove_extra_whitespaces)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        add_id = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
            "eot": writer.add_eot_token_id,
        }
        for role, id in self.ids.items():
            add_id[role](id)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def write_gguf_tokenizer(folder: Path, path: Path) -> list[str]:
    """Write a GGUF file that holds the tokenizer of a folder and no model. Returns where llama.cpp encodes differently.

    Raises ArtefactError, with the reason, for a tokenizer that llama.cpp has no equal for.
    """
    import gguf

    values = gguf_tokenizer(folder)
    with new_file(path) as unfinished:
        # llama.cpp requires an architecture that it knows, also without a model
        writer = gguf.GGUFWriter(unfinished, "llama")
        writer.add_type("vocab")
        writer.add_vocab_size(len(values.tokens))
        values.add_to(writer)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        finally:
            writer.close()
    return values.notes


def gguf_tokenizer(folder: Path) -> GgufTokenizer:
    """The GGUF keys of the tokenizer in a folder (or a model's folder). Raises ArtefactError with the reason where
    llama.cpp has no equal for it."""
    path = folder / TOKENIZER_FILE
    content = read_json(path, "tokenizer")
    model = content["model"]
    kind: Callable[[Path, Mapping[str, Any], _Ids], GgufTokenizer] | None = None
    if model["type"] == "Unigram":
        kind = _unigram
    elif model["type"] == "BPE":
        kind = _byte_level if _is_byte_level(content) else _sentencepiece_bpe
    if kind is None:
        reason = _REASONS.get(model["type"], "llama.cpp has no tokenizer like it")
        raise ArtefactError(f"{path}: a {model['type']} tokenizer cannot be exported to GGUF: {reason}")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    ids = _Ids(tokenizer, read_roles(folder), model.get("byte_fallback", False), escapes_spaces=kind is not _byte_level)
    values = kind(path, content, ids)
    values.add_bos, values.add_eos = ids.around(values.notes)
    values.ids = ids.roles
    values.chat_template = read_chat_template(folder)
    if content["added_tokens"] and any(
        token["lstrip"] or token["rstrip"] or token["single_word"] for token in content["added_tokens"]
    ):
        values.notes.append("added tokens that take the white space beside them along do not in llama.cpp")
    return values


_REASONS = {
    "WordPiece": (
        "llama.cpp's WordPiece normalises text in a way of its own (it decomposes accents and drops control characters), "
        "drops white space and replaces a whole word that it cannot write, so the ids would differ"
    ),
    "WordLevel": "llama.cpp has no tokenizer of whole words",
}


class _Ids:
    """The tokens by id, their types, and the ids of the roles (bos, eos, unk, pad, eot)."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, roles: Mapping[str, str | None], byte_fallback: bool, escapes_spaces: bool
    ) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        count = max(vocabulary.values()) + 1
        # gaps get the name that other converters give them
        self.tokens = [f"[PAD{id}]" for id in range(count)]
        self.types = [int(TokenType.UNUSED)] * count
        for token, id in vocabulary.items():
            is_byte = byte_fallback and byte_of_name(token) is not None
            self.tokens[id], self.types[id] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
        for id, added in tokenizer.get_added_tokens_decoder().items():
            # llama.cpp matches added tokens before it writes spaces as U+2581
            written_with_mark = escapes_spaces and added.normalized and not added.special
            self.tokens[id] = added.content.replace(SPACE_MARK, " ") if written_with_mark else added.content
            self.types[id] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        self.roles: dict[str, int] = {}
        for role in ("bos", "eos", "unk", "pad"):
            named = roles[f"{role}_token"]
            role_id = None if named is None else tokenizer.token_to_id(named)
            if role_id is not None:
                self.roles[role] = role_id
        turn_end = next((id for id in map(tokenizer.token_to_id, TURN_ENDS) if id is not None), None)
        if turn_end is not None:
            self.roles["eot"] = turn_end

    def pieces(self) -> dict[str, int]:
        """The learned tokens and their ids, in the order of the ids."""
        return {self.tokens[id]: id for id, kind in enumerate(self.types) if kind == TokenType.NORMAL}

    def set_unknown(self, token: str | None) -> None:
        """Make a token the unknown token."""
        if token is not None:
            id = self.tokens.index(token)
            self.types[id] = int(TokenType.UNKNOWN)
            self.roles["unk"] = id

    def around(self, notes: list[str]) -> tuple[bool, bool]:
        """Whether a begin token is put before a text, and an end token after it; anything else adds to `notes`."""
        text = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        at = next((at for at in range(len(whole)) if whole[at : at + len(text)] == text), 0)
        before, after = whole[:at], whole[at + len(text) :]
        adds_bos, adds_eos = before == [self.roles.get("bos")], after == [self.roles.get("eos")]
        if (before and not adds_bos) or (after and not adds_eos):
            notes.append("the tokens that this tokenizer puts around a text have no setting in GGUF; llama.cpp adds none")
        return adds_bos, adds_eos


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps_of(content["pre_tokenizer"]))


def _byte_level(path: Path, content: Mapping[str, Any], ids: _Ids) -> GgufTokenizer:
    split = split_name(content["pre_tokenizer"])
    if split is None:
        raise ArtefactError(
            f"{path}: this tokenizer cannot be exported to GGUF, which names the split regex and does not hold it: llama.cpp "
            f"has no name for this one (it has {', '.join(SPLIT_REGEXES)})"
        )
    notes = notes_of_split(split) + notes_of_bytes(content["model"]["vocab"])
    for step in steps_of(content["normalizer"]):
        if step["type"] not in ("NFC", "NFKC", "NFD", "NFKD"):
            raise ArtefactError(
                f"{path}: this tokenizer cannot be exported to GGUF: it changes text before splitting ({step['type']}), and "
                "llama.cpp does not"
            )
        notes.append(f"llama.cpp does not normalise: text that is not in {step['type']} gets other ids there")
    model = content["model"]
    if not model.get("ignore_merges") and split in WHOLE_PIECES:
        notes += _note_of_unreachable(
            model, "llama.cpp writes them where they stand alone with this split; this tokenizer does not"
        )
    elif model.get("ignore_merges") and split not in WHOLE_PIECES:
        notes += _note_of_unreachable(model, "this tokenizer writes them where they stand alone, llama.cpp does not")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GgufTokenizer("gpt2", ids.tokens, ids.types, pre=split, merges=merges or [" ".join(NO_MERGES)], notes=notes)


def _note_of_unreachable(model: Mapping[str, Any], what_differs: str) -> list[str]:
    """A note when there are tokens that no merges make: they are written only where they are a whole piece."""
    by_merges = tokenizers.models.BPE(model["vocab"], _pairs(model), ignore_merges=False)
    count = sum(len(by_merges.tokenize(token)) != 1 for token in model["vocab"])
    return [f"{count:,} tokens are made by no merges: {what_differs}"] if count else []


def _sentencepiece_bpe(path: Path, content: Mapping[str, Any], ids: _Ids) -> GgufTokenizer:
    model = content["model"]
    if not model.get("byte_fallback"):
        raise ArtefactError(
            f"{path}: this tokenizer cannot be exported to GGUF: BPE on characters needs its 256 byte tokens there"
        )
    spaces = _spaces(path, content)
    ids.set_unknown(model["unk_token"])
    pieces = ids.pieces()
    merges = _pairs(model)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [_LAST] * len(ids.tokens)
    for piece, id in pieces.items():
        scores[id] = float(-ranks[piece]) if piece in ranks else _LAST
    ways = {(left, right) for left, right in merges_from_scores({piece: scores[id] for piece, id in pieces.items()})}
    if (other := next(iter(ways ^ set(merges)), None)) is not None:
        raise ArtefactError(
            f"{path}: this tokenizer cannot be exported to GGUF: llama.cpp joins any two neighbours that make a token, as "
            f"SentencePiece does, and this one goes by its list of merges ({other[0]!r} + {other[1]!r} differs)"
        )
    notes = spaces.notes(pieces)
    notes += notes_of_controls(ids.tokens, ids.types)
    return GgufTokenizer(
        "llama", ids.tokens, ids.types, scores=scores, add_space_prefix=spaces.prefix, charsmap=None, notes=notes
    )


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model as pairs; older files write a pair as one string."""
    written = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in written]


def _unigram(path: Path, content: Mapping[str, Any], ids: _Ids) -> GgufTokenizer:
    model = content["model"]
    spaces = _spaces(path, content)
    scores = [0.0] * len(ids.tokens)
    for id, (_, score) in enumerate(model["vocab"]):
        scores[id] = float(score)
    if model["unk_id"] is None:
        raise ArtefactError(f"{path}: this tokenizer cannot be exported to GGUF: llama.cpp's Unigram needs an unknown token")
    ids.set_unknown(model["vocab"][model["unk_id"]][0])
    notes = spaces.notes(ids.pieces())
    if model.get("byte_fallback"):
        notes.append(
            "llama.cpp's Unigram has no byte fallback: a character outside the vocabulary becomes the unknown token there "
            f"(the vocabulary has {sum(len(piece) == 1 for piece in ids.pieces()):,} characters)"
        )
    return GgufTokenizer(
        "t5",
        ids.tokens,
        ids.types,
        scores=scores,
        add_space_prefix=spaces.prefix,
        remove_extra_whitespaces=spaces.merged,
        charsmap=spaces.charsmap,
        notes=notes,
    )


@dataclass
class _Spaces:
    """How a tokenizer of SentencePiece's kind treats spaces before it looks for pieces."""

    escaped: bool = False
    prefix: bool = False
    merged: bool = False
    splits: bool = False
    words: bool = False
    charsmap: bytes | None = None
    only_first: bool = False

    def notes(self, pieces: Mapping[str, int]) -> list[str]:
        """What llama.cpp does differently, a sentence each."""
        notes = []
        if self.only_first:
            notes.append(
                "llama.cpp puts the space before a text also behind every control token, this tokenizer only at the beginning"
            )
        words = re.compile(WORD)
        if self.words and any(len(words.findall(piece)) > 1 for piece in pieces):
            notes.append(
                "llama.cpp does not cut text into words: tokens of several, which this tokenizer never writes, appear there"
            )
        if self.splits and any(SPACE_MARK in piece[1:] for piece in pieces):
            notes.append(
                "llama.cpp does not cut at spaces: tokens with a space inside, which this tokenizer never writes, appear there"
            )
        return notes


def _spaces(path: Path, content: Mapping[str, Any]) -> _Spaces:
    """What `normalizer` and `pre_tokenizer` do to spaces. Raises ArtefactError when they do what llama.cpp cannot."""
    spaces = _Spaces()
    steps = steps_of(content["normalizer"]) + steps_of(content["pre_tokenizer"])
    for step, following in zip(steps, [*steps[1:], None], strict=False):
        kind = step["type"]
        pattern = step.get("pattern", {})
        if kind == "NFC" and following is not None and following["type"] == "Precompiled":
            # added on import, because `Precompiled` composes less than SentencePiece's own map
            continue
        if kind == "Replace" and pattern == {"String": " "} and step["content"] == SPACE_MARK:
            spaces.escaped = True
        elif kind == "Prepend" and step["prepend"] == SPACE_MARK:
            spaces.prefix = True
        elif kind in ("Strip", "WhitespaceSplit") or step in MERGE_SPACES:
            spaces.merged = True
        elif kind == "Split" and pattern == {"Regex": WORD}:
            spaces.words = True
        elif kind == "Precompiled":
            spaces.charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif kind == "Metaspace" and step["replacement"] == SPACE_MARK:
            spaces.escaped = True
            spaces.prefix = step["prepend_scheme"] != "never"
            spaces.only_first = step["prepend_scheme"] == "first"
            spaces.splits = step.get("split", True)
        else:
            raise ArtefactError(
                f"{path}: this tokenizer cannot be exported to GGUF: llama.cpp has no equal for its {kind} step"
            )
    if not spaces.escaped:
        raise ArtefactError(f"{path}: this tokenizer cannot be exported to GGUF: it does not write spaces as {SPACE_MARK}")
    if spaces.merged and content["model"]["type"] == "BPE":
        raise ArtefactError(f"{path}: this tokenizer cannot be exported to GGUF: llama.cpp's BPE keeps runs of spaces")
    return spaces
