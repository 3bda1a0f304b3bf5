"""Names of bytes in a byte-level vocabulary: GPT-2's table."""

from __future__ import annotations

from functools import cache


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
