"""A tokenizer folder that needs no training."""

from __future__ import annotations

from pathlib import Path

from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.folder import write_folder

#: 256 bytes, a few merges, three control tokens.
VOCAB_SIZE = 263


def write_small_tokenizer(folder: Path) -> Path:
    """Bytes and a few merges; returns the folder."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" a", b"in"]
    write_folder(folder, byte_level_bpe(tokens, "qwen2"))
    return folder
