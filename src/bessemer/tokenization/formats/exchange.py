"""Import and export of tokenizers in the formats of other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import new_folder
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.split import APPROXIMATED_REGEXES, SPLIT_REGEXES

#: What a tokenizer can be read from.
Source = Literal["gguf", "tokenizer.json", "vocab.json", "sentencepiece", "tiktoken"]
#: What a tokenizer can be written as.
Format = Literal["gguf", "sentencepiece", "tiktoken"]
FORMATS: tuple[Format, ...] = get_args(Format)

_GGUF_MAGIC = b"GGUF"
#: A tokenizer's file in a folder: the first of these names that exists is read.
_NAMES = (TOKENIZER_FILE, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def import_tokenizer(
    source: Path, folder: Path, *, split: str | None = None, special_tokens: Sequence[str] | Mapping[str, int] = ()
) -> tuple[Source, list[str]]:
    """Read a tokenizer from a file or folder of another tool into a Hugging Face folder, ids kept.

    split, special_tokens: for a format that does not hold them (tiktoken). Returns the format, which is recognised by content,
    and how the folder differs from the source, a sentence each. The folder is created atomically. Raises ArtefactError for a
    source that is no tokenizer or cannot be read, ConfigError when `split` or `special_tokens` must be given.
    """
    from bessemer.tokenization.tokenizer import load_tokenizer

    kind, path = find_source(source)
    with new_folder(folder) as partial:
        notes = _read(kind, path, partial, split, special_tokens)
        load_tokenizer(partial)
    return kind, notes


def _read(kind: Source, path: Path, folder: Path, split: str | None, special: Sequence[str] | Mapping[str, int]) -> list[str]:
    if special and kind != "tiktoken":
        raise ConfigError(f"{path}: --special is for tiktoken files; a {kind} holds its control tokens")
    if split is not None and kind in ("tokenizer.json", "sentencepiece"):
        raise ConfigError(f"{path}: --split is for files that do not hold it; a {kind} does")
    if split is not None and split not in SPLIT_REGEXES | APPROXIMATED_REGEXES:
        known = [*SPLIT_REGEXES, *APPROXIMATED_REGEXES]
        raise ConfigError(f"{path}: there is no split {split!r}{nearest(split, known)}; splits: {', '.join(known)}")
    if kind == "tokenizer.json":
        from bessemer.tokenization.formats.huggingface import import_tokenizer_json

        return import_tokenizer_json(path, folder)
    if kind == "gguf":
        from bessemer.tokenization.formats.gguf_import import import_gguf

        foreign = import_gguf(path, split)
    elif kind == "tiktoken":
        from bessemer.tokenization.formats.tiktoken import import_tiktoken

        foreign = import_tiktoken(path, split, special)
    elif kind == "sentencepiece":
        from bessemer.tokenization.formats.sentencepiece_file import import_sentencepiece

        foreign = import_sentencepiece(path)
    else:
        from bessemer.tokenization.formats.huggingface import import_vocab_and_merges

        foreign = import_vocab_and_merges(path, split)
    foreign.write(folder)
    return list(foreign.notes)


def find_source(source: Path) -> tuple[Source, Path]:
    """The format and the path of a tokenizer's file, or of the one in a folder. Raises ArtefactError when there is none."""
    if not source.exists():
        raise ArtefactError(f"{source}: no such file or folder; check the path")
    if source.is_dir():
        for name in _NAMES:
            if (source / name).exists():
                return find_source(source / name)
        if (source / "vocab.json").exists() and (source / "merges.txt").exists():
            return "vocab.json", source
        models = sorted(source.glob("*.gguf")) + sorted(source.glob("*.tiktoken"))
        if len(models) == 1:
            return find_source(models[0])
        many = f"several files ({', '.join(path.name for path in models)}); name one" if models else "no tokenizer known here"
        raise ArtefactError(f"{source}: this folder holds {many}")
    with source.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(_GGUF_MAGIC):
        return "gguf", source
    if head.lstrip()[:1] == b"{":
        return _json_kind(source)
    if _is_tiktoken(head):
        return "tiktoken", source
    if head[:1] == b"\n":
        # protobuf: field 1, the pieces
        return "sentencepiece", source
    raise ArtefactError(
        f"{source}: not a tokenizer known here (GGUF, tokenizer.json, vocab.json with merges.txt, SentencePiece, tiktoken)"
    )


def _json_kind(path: Path) -> tuple[Source, Path]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{path}: this JSON file is damaged ({error})") from None
    if isinstance(content.get("model"), dict):
        return "tokenizer.json", path
    if path.name == "vocab.json" and path.with_name("merges.txt").exists():
        return "vocab.json", path.parent
    raise ArtefactError(f"{path}: this JSON file is no tokenizer.json, and no vocab.json with a merges.txt beside it")


def _is_tiktoken(head: bytes) -> bool:
    first = head.split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit()


def export_tokenizer(folder: Path, path: Path, format: Format) -> list[str]:
    """Write the tokenizer of a folder, which may be a model's, as a file of another tool.

    Returns where that tool encodes differently, a sentence each. Raises ArtefactError, with the reason, for a tokenizer that
    the tool has no equal for.
    """
    if not (folder / TOKENIZER_FILE).exists():
        raise ArtefactError(f"{folder}: holds no tokenizer ({TOKENIZER_FILE}) to export")
    if path.is_dir():
        raise ArtefactError(f"{path}: is a folder; name the file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "gguf":
        from bessemer.tokenization.formats.gguf_export import write_gguf_tokenizer

        return write_gguf_tokenizer(folder, path)
    if format == "tiktoken":
        from bessemer.tokenization.formats.tiktoken import write_tiktoken

        return write_tiktoken(folder, path)
    if format == "sentencepiece":
        from bessemer.tokenization.formats.sentencepiece_file import write_sentencepiece

        write_sentencepiece(folder, path)
        return []
    raise ConfigError(f"no format is named {format!r}; there are {', '.join(FORMATS)}")
