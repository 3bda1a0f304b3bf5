"""SentencePiece's `.model` files: read into a Hugging Face folder with their ids kept, and written from one.

A `.model` holds the pieces by id, each with a score and a type, the normalisation, and the ids that begin and end a text. It
does not say whether these are added to a text: the folder adds the begin token if there is one.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.environment import install_extra
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import new_file, read_json
from bessemer.tokenization.folder import TOKENIZER_FILE, AddedToken, TokenizerContent, TokenizerParts, bpe_model, learned_size
from bessemer.tokenization.formats.gguf_import import merges_from_scores
from bessemer.tokenization.formats.huggingface import read_roles
from bessemer.tokenization.sentencepieces import MERGE_SPACES, WORD, meta_to_spaces, spaces_to_meta
from bessemer.tokenization.vocabulary import SPACE_MARK, byte_of_name, steps_of

#: SentencePiece's own maps that compose characters, as NFC does. The `Precompiled` normalizer of tokenizers misses many.
_UNICODE_MAPS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")


#: Score of a user-defined symbol in SentencePiece's Unigram, per byte: 0.1 in float32.
_SCORE_OF_A_BYTE = 13421773 / 2**27


def import_sentencepiece(path: Path) -> TokenizerContent:
    """Read a `.model` (Unigram or BPE), ids and control tokens kept.

    Raises ArtefactError for a file that is damaged, or of a kind that a `tokenizer.json` cannot be made of.
    """
    model = _parse(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = type(model.pieces[0])
    kind = type(trainer).ModelType.Name(trainer.model_type)
    unread = {
        f"model type {kind}": kind not in ("UNIGRAM", "BPE"),
        "spaces after words": trainer.treat_whitespace_as_suffix,
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "unused pieces": any(piece.type == types.UNUSED for piece in model.pieces),
        "no unknown piece": not any(piece.type == types.UNKNOWN for piece in model.pieces),
    }
    if reasons := [reason for reason, there in unread.items() if there]:
        raise ArtefactError(f"{path}: this SentencePiece model cannot be read: {', '.join(reasons)}")
    unknown = next(id for id, piece in enumerate(model.pieces) if piece.type == types.UNKNOWN)
    prefix, merged = normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces
    charsmap = normalizer.precompiled_charsmap
    # Unigram finds user-defined symbols by their scores, as pieces; for BPE they must be added tokens
    added = tuple(
        # matched in normalised text as in SentencePiece, unless a space prefix would become part of the symbol
        AddedToken(id, piece.piece, special=False, normalized=not prefix)
        if piece.type == types.USER_DEFINED
        else AddedToken(id, piece.piece, special=True)
        for id, piece in enumerate(model.pieces)
        if piece.type in (types.UNKNOWN, types.CONTROL) or (piece.type == types.USER_DEFINED and kind == "BPE")
    )
    size = max(learned_size(len(model.pieces), {token.id for token in added}), unknown + 1)
    byte_fallback = any(piece.type == types.BYTE for piece in model.pieces)
    to_meta = spaces_to_meta(prefix=prefix, merge=merged, charsmap=charsmap or None)
    notes = []
    if charsmap:
        if normalizer.name in _UNICODE_MAPS:
            to_meta["normalizers"].insert(0, {"type": "NFC"})
        notes.append("tokenizers' normalizer differs from SentencePiece's where a combining mark follows a rare character")
    if prefix and any(not token.special for token in added):
        notes.append("a text that begins with a user-defined symbol has no space piece before it, as it has in SentencePiece")
    if kind == "UNIGRAM":
        vocab = _unigram_vocab(model.pieces[:size])
        section = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback}
    else:
        section = bpe_model(
            [piece.piece for piece in model.pieces[:size]],
            merges_from_scores({piece.piece: piece.score for piece in model.pieces if piece.type == types.NORMAL}),
            unk_token=model.pieces[unknown].piece,
            byte_fallback=byte_fallback,
        )
    parts = TokenizerParts(
        size=size,
        model=section,
        pre_tokenizer=_names_cut(model.pieces[:size]) if kind == "UNIGRAM" else None,
        normalizer=to_meta,
        decoder=meta_to_spaces(prefix=prefix or merged),
    )
    roles: dict[str, str | None] = {"bos_token": None, "eos_token": None, "unk_token": model.pieces[unknown].piece}
    for role in ("bos", "eos", "pad"):
        id, piece = getattr(trainer, f"{role}_id"), getattr(trainer, f"{role}_piece")
        there = 0 <= id < len(model.pieces) and model.pieces[id].piece == piece and model.pieces[id].type == types.CONTROL
        roles[f"{role}_token"] = piece if there else None
    return TokenizerContent(
        parts=parts,
        added=added,
        roles=roles,
        add_bos=roles["bos_token"] is not None,
        notes=tuple(notes),
    )


def _parse(path: Path) -> Any:
    from google.protobuf.message import DecodeError

    model = _messages().ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ArtefactError(f"{path}: this SentencePiece model is damaged ({error})") from None
    if not model.pieces:
        raise ArtefactError(f"{path}: this file holds no SentencePiece model")
    return model


def _unigram_vocab(pieces: Sequence[Any]) -> list[list[Any]]:
    """(piece, score) of a Unigram model, with scores for which `tokenizers` segments texts as SentencePiece does.

    It matches every entry in the text, SentencePiece only normal and user-defined ones: the others get a score so low that
    their characters are better. A user-defined symbol scores by its length, as in SentencePiece.
    """
    types = type(pieces[0])
    normal = [piece.score for piece in pieces if piece.type == types.NORMAL]
    lowest = min(normal, default=0.0)
    vocab: list[list[Any]] = []
    for piece in pieces:
        if piece.type == types.NORMAL:
            score = piece.score
        elif piece.type == types.USER_DEFINED:
            score = len(piece.piece.encode()) * _SCORE_OF_A_BYTE
        else:
            score = (lowest - 1) * (len(piece.piece) + 1)
        vocab.append([piece.piece, score])
    return vocab


def write_sentencepiece(folder: Path, path: Path) -> None:
    """Write the tokenizer of a folder (or of a model's folder) as a `.model` that the sentencepiece library encodes alike.

    The control tokens are CONTROL pieces at their ids, so that the library does not find them in text. Raises ArtefactError,
    with the reason, for a tokenizer that is not of SentencePiece's kind.
    """
    messages = _messages()
    source = folder / TOKENIZER_FILE
    content = read_json(source, "tokenizer")
    pieces = _pieces(source, content)
    model = messages.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=messages.ModelProto.SentencePiece.Type.Value(kind))
    ids = {piece: id for id, (piece, _, _) in enumerate(pieces)}
    kinds = [kind for _, _, kind in pieces]
    trainer = model.trainer_spec
    trainer.model_type = messages.TrainerSpec.ModelType.Value(content["model"]["type"].upper())
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = "BYTE" in kinds
    trainer.allow_whitespace_only_pieces = trainer.split_digits = True
    trainer.unk_id = kinds.index("UNKNOWN")
    trainer.unk_piece = pieces[trainer.unk_id][0]
    roles = read_roles(folder)
    for role in ("bos", "eos", "pad"):
        token = roles[f"{role}_token"]
        setattr(trainer, f"{role}_id", ids.get(token, -1) if token else -1)
        if token in ids:
            setattr(trainer, f"{role}_piece", token)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    for step in steps_of(content["normalizer"]):
        if step["type"] == "Prepend":
            normalizer.add_dummy_prefix = True
        elif step["type"] == "Precompiled":
            normalizer.name = "user_defined"
            normalizer.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step in MERGE_SPACES:
            normalizer.remove_extra_whitespaces = True
    with new_file(path) as unfinished:
        unfinished.write_bytes(model.SerializeToString(deterministic=True))


def _pieces(path: Path, content: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Piece, score and type by id."""
    model = content["model"]
    steps = steps_of(content["normalizer"]) + steps_of(content["pre_tokenizer"])
    strange = [step["type"] for step in steps if not _is_sentencepiece(step)]
    if model["type"] not in ("Unigram", "BPE") or not any(_escapes(step) for step in steps) or strange:
        what = strange[0] if strange else f"{model['type']} that does not write spaces as {SPACE_MARK}"
        raise ArtefactError(
            f"{path}: this tokenizer cannot be written as a SentencePiece model, which has no equal for its {what}; the "
            "algorithms unigram and sentencepiece_bpe make tokenizers that can"
        )
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        vocab = {piece: id for id, (piece, _) in enumerate(model["vocab"])}
        unknown = model["vocab"][model["unk_id"]][0]
    else:
        vocab, unknown = model["vocab"], model["unk_token"]
        ranked = dict.fromkeys(left + right for left, right in model["merges"])
        scores = {
            piece: -float(rank) for rank, piece in enumerate([*ranked, *(piece for piece in vocab if piece not in ranked)])
        }
    added = {token["content"]: token for token in content["added_tokens"]}
    by_id = {id: piece for piece, id in vocab.items()} | {token["id"]: token["content"] for token in added.values()}
    if sorted(by_id) != list(range(len(by_id))):
        raise ArtefactError(f"{path}: this tokenizer has ids without a token, which a SentencePiece model cannot hold")
    pieces = []
    for _, piece in sorted(by_id.items()):
        kind = "NORMAL"
        if piece == unknown:
            kind = "UNKNOWN"
        elif piece in added:
            kind = "CONTROL" if added[piece]["special"] else "USER_DEFINED"
        elif model.get("byte_fallback") and byte_of_name(piece) is not None:
            kind = "BYTE"
        pieces.append((piece, scores[piece] if kind == "NORMAL" else 0.0, kind))
    return pieces


#: The behaviour of `Split` that cuts after each match.
_CUT = "MergedWithPrevious"
_ESCAPED_SPACES = spaces_to_meta(prefix=False)


def _escapes(step: Mapping[str, Any]) -> bool:
    return step == _ESCAPED_SPACES or step["type"] == "Metaspace"


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    """Whether a step of the normalizer or the pre-tokenizer is one that we write for a SentencePiece model."""
    if step["type"] == "Metaspace":
        return (step["replacement"], step["prepend_scheme"], step["split"]) == (SPACE_MARK, "never", False)
    return (
        step == _ESCAPED_SPACES
        or step in MERGE_SPACES
        or step["type"] in ("Precompiled", "NFC")
        or step == {"type": "Prepend", "prepend": SPACE_MARK}
        or (step["type"] == "Split" and (step["pattern"] == {"Regex": WORD} or step["behavior"] == _CUT))
    )


def _names_cut(pieces: Sequence[Any]) -> dict[str, Any] | None:
    """A pre-tokenizer that cuts typed names of byte and control tokens, at a place that no piece spans. None if none needs it.

    A name needs it when one of its characters is not in the vocabulary: unknown characters score lowest, so `tokenizers` would
    prefer the token of that name.
    """
    types = type(pieces[0])
    texts = [piece.piece for piece in pieces if piece.type in (types.NORMAL, types.USER_DEFINED)]
    known = {piece for piece in texts if len(piece) == 1}
    pairs = {piece[at : at + 2] for piece in texts for at in range(len(piece) - 1)}
    cuts = []
    for name in (piece.piece for piece in pieces if piece.type not in (types.NORMAL, types.USER_DEFINED)):
        # between a known and an unknown character: consecutive unknown ones are one token
        cuttable = (at for at in range(1, len(name)) if (name[at - 1] in known) != (name[at] in known))
        at = next((at for at in cuttable if name[at - 1 : at + 1] not in pairs), None)
        if at is not None:
            before = f"(?<={re.escape(name[: at - 1])})" if at > 1 else ""
            cuts.append(f"{before}{re.escape(name[at - 1])}(?={re.escape(name[at:])})")
    if not cuts:
        return None
    return {"type": "Split", "pattern": {"Regex": "|".join(cuts)}, "behavior": _CUT, "invert": False}


def _messages() -> Any:
    """The library's protobuf messages."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except (ImportError, TypeError, RuntimeError) as error:
        # a protobuf older than the one the messages were made for
        raise ConfigError(
            f"SentencePiece models need the packages sentencepiece and protobuf, new enough for each other ({error}); "
            f"{install_extra('tokenize')}"
        ) from None
    return sentencepiece_model_pb2
