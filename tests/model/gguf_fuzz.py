"""GGUF files with one value of their metadata changed: to another type, or to another number."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _array(kind: int, length: int, content: bytes) -> bytes:
    return struct.pack("<IIQ", _ARRAY, kind, length) + content


#: What is put in a value's place, with its type before it.
VALUES = {
    "0": struct.pack("<II", 4, 0),
    "1": struct.pack("<II", 4, 1),
    "2³²-1": struct.pack("<II", 4, 2**32 - 1),
    "2⁶³": struct.pack("<IQ", 10, 2**63),
    "2⁴⁰": struct.pack("<IQ", 10, 2**40),
    "-1": struct.pack("<Iq", 11, -1),
    "0.5": struct.pack("<If", 6, 0.5),
    "nan": struct.pack("<If", 6, float("nan")),
    "infinite": struct.pack("<Id", 12, float("inf")),
    "1e300": struct.pack("<Id", 12, 1e300),
    "true": struct.pack("<IB", 7, 1),
    "text": struct.pack("<I", _STRING) + _string("x"),
    "no text": struct.pack("<I", _STRING) + _string(""),
    "no list": _array(4, 0, b""),
    "whole numbers": _array(5, 2, struct.pack("<ii", -7, 2**31 - 1)),
    "numbers": _array(6, 2, struct.pack("<ff", float("nan"), 1e30)),
    "texts": _array(_STRING, 2, _string("a") + _string("")),
    "truths": _array(7, 1, b"\x01"),
}


class Head(NamedTuple):
    """A file in parts. keys: each with its name and its value. lengths: where 64-bit numbers stand that are no values: of keys,
    tensors, strings, lists, shapes and offsets. offsets: those of the last, behind each tensor's number type."""

    keys: list[tuple[str, bytes, bytes]]
    tensors: int
    infos: bytes
    data: bytes
    lengths: list[int]
    offsets: list[int]


def read(content: bytes) -> Head:
    """The parts of a whole file."""
    at, lengths = 24, [8, 16]
    tensors, count = struct.unpack_from("<QQ", content, 8)

    def text(at: int) -> int:
        lengths.append(at)
        return at + 8 + struct.unpack_from("<Q", content, at)[0]

    def value(kind: int, at: int) -> int:
        if kind == _STRING:
            return text(at)
        if kind != _ARRAY:
            return at + _SIZES[kind]
        element, length = struct.unpack_from("<IQ", content, at)
        lengths.append(at + 4)
        at += 12
        if element != _STRING:
            return at + length * _SIZES[element]
        known = len(lengths)
        for _ in range(length):
            at = text(at)
        # of the tokens' lengths, the first few
        del lengths[known + 3 :]
        return at

    keys = []
    for _ in range(count):
        begin = at
        at = text(at)
        name = content[begin + 8 : at].decode()
        (kind,) = struct.unpack_from("<I", content, at)
        end = value(kind, at + 4)
        keys.append((name, content[begin:at], content[at:end]))
        at = end
    begin, offsets = at, []
    for _ in range(tensors):
        at = text(at)
        (dimensions,) = struct.unpack_from("<I", content, at)
        lengths += range(at + 4, at + 4 + 8 * dimensions, 8)
        lengths.append(at + 8 + 8 * dimensions)
        offsets.append(lengths[-1])
        at += 4 + 8 * dimensions + 12
    return Head(keys, tensors, content[begin:at], content[-(-at // 32) * 32 :], lengths, offsets)


def changed_files(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """What is changed, to what, and the file: each value of the metadata by each of `VALUES`, each length by three others."""
    content = path.read_bytes()
    head = read(content)
    for place, (name, _, old) in enumerate(head.keys):
        for word, new in VALUES.items():
            if new == old:
                continue
            parts = [raw + (new if number == place else value) for number, (_, raw, value) in enumerate(head.keys)]
            begin = content[:24] + b"".join(parts) + head.infos
            yield name, word, begin + bytes(-len(begin) % 32) + head.data
    for at in head.lengths:
        for number in (0, 2**40, 2**64 - 1):
            yield f"byte {at}", str(number), content[:at] + struct.pack("<Q", number) + content[at + 8 :]
