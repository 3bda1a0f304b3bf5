"""A tokenizer folder that needs no training."""

from __future__ import annotations

from pathlib import Path

from bessemer.tokenization.folder import write_folder

#: 256 bytes, a few merges, three control tokens.
VOCAB_SIZE = 263


def write_small_tokenizer(folder: Path) -> Path:
    """Bytes and a few merges; returns the folder."""
    write_folder(folder, [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" a", b"in"], "qwen2")
    return folder
