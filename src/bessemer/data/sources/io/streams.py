"""Streams of bytes, decompressed as they are read, that never raise on damage: a damaged stream ends early.

So a reader handles what came before the damage as it would any other input, and looks at `damage` at the end. A stream
that expands beyond all reason (a decompression bomb) ends early too. Memory is bounded by a block, whatever is inside.
"""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
from collections import deque
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import zstandard
from isal import igzip_lib

from bessemer.core.errors import BessemerError
from bessemer.core.object_storage import Place
from bessemer.core.text_encoding import UTF8, encoding_of
from bessemer.data.sources.io.paths import compression_of

#: Bytes of a text by which its encoding is detected.
SAMPLE_BYTES = 4 << 20
_BLOCK = 1 << 18
_BITE = 1 << 11
#: Bytes that a stream may expand to before its ratio is looked at, and the highest ratio to its compressed size after. Text
#: compresses to a tenth, tables of repeated records to a hundredth; deflate cannot exceed 1,032, bombs come close to it.
_FREE_BYTES = 64 << 20
_MOST_EXPANSION = 250
#: Largest dictionary or window of a compressed file: what `xz -9` and `zstd --ultra` need.
_MOST_WINDOW = 1 << 27
#: How a member begins, where that tells it from other bytes: reading can go on there after damage.
_MEMBER_MAGIC = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}
_GLANCE = 4096


@dataclass(frozen=True, slots=True)
class Damage:
    """Reason for a stream's early end: the kind under which it is counted, and a sentence."""

    kind: str
    why: str


class _Decoder(Protocol):
    """One compressed member or frame; the interface of the standard library's incremental decompressors."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _ZstdFrame:
    """A zstd frame behind the interface of the others. It takes small bites, since it cannot bound what it returns: a
    block of 4 bytes may stand for 128 kB."""

    _BITE = 1024

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW).decompressobj()
        self._waiting = b""
        self.unused_data = b""
        self.eof = False
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        waiting = memoryview(self._waiting + data)
        chunks, size, at = [], 0, 0
        while at < len(waiting) and size < max_length and not self.eof:
            chunk = self._frame.decompress(waiting[at : at + self._BITE])
            at += self._BITE
            chunks.append(chunk)
            size += len(chunk)
            if self._frame.eof:
                self.eof = True
                self.unused_data = self._frame.unused_data + bytes(waiting[at:])
        self._waiting = b"" if self.eof else bytes(waiting[at:])
        self.needs_input = not self._waiting
        return b"".join(chunks)


def _decoder(compression: str) -> _Decoder:
    if compression == ".gz":
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)  # type: ignore[no-any-return]
    if compression == ".bz2":
        return bz2.BZ2Decompressor()
    if compression == ".xz":
        return lzma.LZMADecompressor(memlimit=2 * _MOST_WINDOW)
    return _ZstdFrame()


_ISAL_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]
_DECODER_ERRORS = (OSError, EOFError, ValueError, lzma.LZMAError, _ISAL_ERROR, zstandard.ZstdError)


_READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, lzma.LZMAError)


class _Expanded(io.RawIOBase):
    """The decompressed bytes of a file, one member after the other, from the member that begins at `start` on. Decoders get
    small bites, for what they have made of a bite that turns out damaged is lost."""

    def __init__(self, source: IO[bytes], compression: str, start: int) -> None:
        self._source = source
        self._compression = compression
        self._decoder: _Decoder | None = None
        #: A block of the file, where in the file it begins, and how far of it has been handed to decoders.
        self._block = b""
        self._block_start = start
        self._at = 0
        self._first = start
        self._ready = memoryview(b"")
        self._produced = self._given = 0
        #: Where members begin: (offset in this stream, offset in the file), the latest last.
        self.members: deque[tuple[int, int]] = deque(maxlen=4096)
        #: Bytes of this stream that belong to members that ended well, their checksum included.
        self.verified = 0
        self.damage: Damage | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._given

    def readinto(self, buffer: Any) -> int:
        if not self._ready:
            self._ready = memoryview(self._next(max(len(buffer), _BLOCK)))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._given += count
        return count

    def _next(self, most: int) -> bytes:
        while self.damage is None:
            if self._decoder is None and not self._begin():
                break
            assert self._decoder is not None
            bite = b""
            if self._decoder.needs_input:
                if self._at == len(self._block) and not self._refill():
                    self.damage = self.damage or Damage("damaged_files", f"cut off: its {self._compression} ends in the middle")
                    break
                bite = self._block[self._at : self._at + _BITE]
                self._at += len(bite)
            try:
                data = self._decoder.decompress(bite, most)
            except _DECODER_ERRORS as error:
                self.damage = Damage("damaged_files", f"damaged {self._compression} ({error})")
                break
            self._produced += len(data)
            if self._produced > _FREE_BYTES + _MOST_EXPANSION * (self._block_start + self._at - self._first):
                self.damage = Damage("decompression_bombs", f"expands more than {_MOST_EXPANSION} times")
                break
            if self._decoder.eof:
                self._at -= len(self._decoder.unused_data)
                self._decoder = None
                self.verified = self._produced
            if data:
                return data
        return b""

    def _begin(self) -> bool:
        """Prepare for the next member; False at the file's end. Padding with zeros is allowed, as gzip and xz allow it."""
        while self._at == len(self._block) or self._block[self._at] == 0:
            if self._at < len(self._block):
                self._at = len(self._block) - len(self._block[self._at :].lstrip(b"\0"))
            elif not self._refill():
                return False
        self.members.append((self._produced, self._block_start + self._at))
        self._decoder = _decoder(self._compression)
        return True

    def _refill(self) -> bool:
        """Take the next block of the file; False where there is none."""
        self._block_start += len(self._block)
        self._block = self._read()
        self._at = 0
        return bool(self._block)

    def _read(self) -> bytes:
        try:
            return self._source.read(_BLOCK)
        except _READ_ERRORS as error:
            self.damage = Damage("damaged_files", f"cannot be read on ({error})")
            return b""

    def go_on(self) -> bool:
        """After damage in a .gz or .zst file: continue at the next place that looks like a member; False when there is none.
        The stream's offsets go on as if nothing had been between."""
        magic = _MEMBER_MAGIC.get(self._compression)
        if magic is None or self.damage is None or self.damage.kind != "damaged_files":
            return False
        behind = (self.members[-1][1] if self.members else self._first) + 1
        # within the block where possible, so that many damaged members cost one reading
        if self._block_start <= behind:
            self._at = behind - self._block_start
        else:
            self._source.seek(behind)
            self._block = b""
            self._block_start = behind
            self._at = 0
        self._decoder = None
        self._ready = memoryview(b"")
        self._produced = self._given
        self.damage = None
        while True:
            at = self._block.find(magic, self._at)
            self._at = at if at >= 0 else max(len(self._block) - len(magic) + 1, self._at)
            if at >= 0 and _looks_like_a_member(self._block[at : at + _GLANCE], self._compression):
                return True
            # the block has no magic, or too few bytes after it to recognise a member: read more
            if at < 0 or len(self._block) - at < _GLANCE:
                more = self._read()
                if not more and at < 0:
                    return False
                if more:
                    self._block_start += self._at
                    self._block = self._block[self._at :] + more
                    self._at = 0
                    continue
            self._at = at + 1


def _looks_like_a_member(data: bytes, compression: str) -> bool:
    try:
        return bool(_decoder(compression).decompress(data, 16))
    except _DECODER_ERRORS:
        return False


class _Plain(io.RawIOBase):
    """The bytes of something that is not compressed (or whose archive decompresses it), errors turned into an early end."""

    def __init__(self, source: IO[bytes], start: int, compressed_bytes: int | None = None, size: int = 0) -> None:
        self._source = source
        self._given = start
        self._compressed_bytes = compressed_bytes
        self._size = size
        self.damage: Damage | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._given

    def readinto(self, buffer: Any) -> int:
        if self.damage is not None:
            return 0
        try:
            data = self._source.read(len(buffer))
        except BessemerError:  # a connection that broke: nothing is said about the file
            raise
        except Exception as error:  # zipfile and tarfile hand on whatever a decoder raises
            self.damage = Damage("damaged_files", f"damaged or cut off ({error or type(error).__name__})")
            return 0
        if not data and self._given < self._size:
            self.damage = Damage("damaged_files", f"cut off after {self._given:,} of {self._size:,} bytes")
        self._given += len(data)
        if self._compressed_bytes is not None and self._given > _FREE_BYTES + _MOST_EXPANSION * self._compressed_bytes:
            self.damage = Damage("decompression_bombs", f"expands more than {_MOST_EXPANSION} times")
            return 0
        buffer[: len(data)] = data
        return len(data)


class _Recoded(io.RawIOBase):
    """The text of a stream as UTF-8, of which the beginning was read already to find its encoding out."""

    def __init__(self, begun: bytes, rest: Stream, encoding: str) -> None:
        self._rest = rest
        self._decoder = None if encoding == UTF8 else codecs.getincrementaldecoder(encoding)("replace")
        self._waiting = begun
        self._ready = memoryview(b"")
        self._ended = False
        self._given = 0

    @property
    def damage(self) -> Damage | None:
        """Damage of the stream below, once all before it was read."""
        return self._rest.damage if self._ended and not self._ready else None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._given

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data = self._waiting or self._rest.read(_BLOCK)
            self._waiting = b""
            self._ended = not data
            if self._decoder is not None:
                data = self._decoder.decode(data, final=not data).encode("utf-8", "replace")
            self._ready = memoryview(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._given += count
        return count


class Stream(io.BufferedReader):
    """Buffered bytes; `tell` is the offset in them. Never raises on damage: see `damage` after the end."""

    def __init__(self, raw: _Expanded | _Plain | _Recoded, source: IO[bytes]) -> None:
        super().__init__(raw, buffer_size=_BLOCK)
        self._behind = raw
        self._file = source

    @property
    def damage(self) -> Damage | None:
        """Reason for an early end; None without one."""
        return self._behind.damage

    @property
    def given(self) -> int:
        """Bytes read from the raw stream, also after closing."""
        return self._behind.tell()

    @property
    def compressed(self) -> bool:
        """Whether this stream decompresses, so that `restart` counts members."""
        return isinstance(self._behind, _Expanded)

    @property
    def verified(self) -> int:
        """Offset up to which members ended well, their checksums included."""
        return self._behind.verified if isinstance(self._behind, _Expanded) else self.tell()

    def member_at(self, offset: int) -> tuple[int, int]:
        """The compressed member in which the byte at `offset` lies: (where it begins in this stream, in the file)."""
        assert isinstance(self._behind, _Expanded)
        members = self._behind.members
        while len(members) > 1 and members[1][0] <= offset:
            members.popleft()
        return members[0] if members else (0, 0)

    def go_on(self) -> bool:
        """After damage in a .gz or .zst file of many members: continue behind the damaged one; False where that cannot be."""
        if not isinstance(self._behind, _Expanded):
            return False
        return self._behind.go_on()

    def skip(self, count: int) -> None:
        """Read over `count` bytes, or to the end."""
        while count > 0 and (data := self.read(min(count, _BLOCK))):
            count -= len(data)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._file.close()


def open_stream(path: Place, start: int = 0, *, member: int = 0) -> Stream:
    """The decompressed bytes of a file behind the first `start`, or of the compressed member at byte `member` of the file
    and those that follow. Raises OSError when it cannot be opened."""
    source = cast("IO[bytes]", path.open("rb"))
    compression = compression_of(path.name)
    if not compression:
        source.seek(start)
        return Stream(_Plain(source, start), source)
    source.seek(member)
    stream = Stream(_Expanded(source, compression, member), source)
    stream.skip(start)
    return stream


def stream_of(source: IO[bytes], name: str, start: int, *, size: int = 0, compressed_bytes: int | None = None) -> Stream:
    """The bytes of an archive's member, decompressed as its name says, behind the first `start`. `size`: how many bytes the
    archive promises; `compressed_bytes`: how many they take in it, where it compresses."""
    compression = compression_of(name)
    raw = _Expanded(source, compression, 0) if compression else _Plain(source, 0, compressed_bytes, size)
    stream = Stream(raw, source)
    stream.skip(start)
    return stream


def text_of(stream: Stream) -> tuple[Stream, str]:
    """The text of a stream that stands at its beginning, as UTF-8, and the encoding it is in. What lies further than
    `SAMPLE_BYTES` has no part in finding that out."""
    begun = stream.read(SAMPLE_BYTES)
    encoding = encoding_of(begun, is_whole=len(begun) < SAMPLE_BYTES)
    return Stream(_Recoded(begun, stream, encoding), stream), encoding


def broken_stream(why: str) -> Stream:
    """A stream that could not even be begun."""
    raw = _Plain(io.BytesIO(), 0)
    raw.damage = Damage("damaged_members", why)
    return Stream(raw, io.BytesIO())


def whole_gzip_member(data: bytes) -> bool:
    """Whether bytes are exactly one gzip member that is whole and does not expand beyond reason."""
    with Stream(_Expanded(io.BytesIO(data), ".gz", 0), io.BytesIO()) as stream:
        while stream.read(_BLOCK):
            pass
        return bool(data) and stream.damage is None and stream.member_at(0) == stream.member_at(stream.verified)
