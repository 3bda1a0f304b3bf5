"""SentencePiece's `.model` files: read into a Hugging Face folder with their ids kept, and written from one.

A `.model` holds the pieces by id, each with a score and a type, how the text is normalised, and which ids begin and end a
text. It does not say whether they are put around one: the folder puts the begin token before a text where there is one.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import read_json
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.formats.foreign import AddedToken, ForeignTokenizer, learned_size
from bessemer.tokenization.formats.special_roles import read_roles
from bessemer.tokenization.parts import TokenizerParts
from bessemer.tokenization.sentencepieces import SPACE, WORD, merges_of
from bessemer.tokenization.vocabulary import byte_of_name


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
    for step in _steps(content["normalizer"]):
        if step["type"] == "Prepend":
            normalizer.add_dummy_prefix = True
        elif step["type"] == "Precompiled":
            normalizer.name = "user_defined"
            normalizer.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step in _MERGED_SPACES:
            normalizer.remove_extra_whitespaces = True
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(path: Path, content: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Piece, score and type by id."""
    model = content["model"]
    steps = _steps(content["normalizer"]) + _steps(content["pre_tokenizer"])
    strange = [step["type"] for step in steps if not _is_sentencepiece(step)]
    if model["type"] not in ("Unigram", "BPE") or not any(_escapes(step) for step in steps) or strange:
        what = strange[0] if strange else f"{model['type']} that does not write spaces as {SPACE}"
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


#: Runs of spaces become one, and none are left around the text.
_MERGED_SPACES = (
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)
_ESCAPED_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _escapes(step: Mapping[str, Any]) -> bool:
    return step == _ESCAPED_SPACES or step["type"] == "Metaspace"


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    """Whether a step of the normalizer or the pre-tokenizer is one that we write for a SentencePiece model."""
    if step["type"] == "Metaspace":
        return (step["replacement"], step["prepend_scheme"], step["split"]) == (SPACE, "never", False)
    return (
        step == _ESCAPED_SPACES
        or step in _MERGED_SPACES
        or step["type"] == "Precompiled"
        or step == {"type": "Prepend", "prepend": SPACE}
        or step["type"] == "Split"
        and step["pattern"] == {"Regex": WORD}
    )


def _steps(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if section is None:
        return []
    inner = section.get("normalizers") or section.get("pretokenizers")
    return [step for part in inner for step in _steps(part)] if inner else [section]


def _messages() -> Any:
    """The library's protobuf messages."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except (ImportError, TypeError, RuntimeError) as error:  # a protobuf older than the one the messages were made for
        raise ConfigError(
            f"SentencePiece models need the packages sentencepiece and protobuf, new enough for each other ({error}); "
            "install bessemer[tokenize]"
        ) from None
    return sentencepiece_model_pb2
