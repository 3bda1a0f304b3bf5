"""Streams cut into lines and fragments on bounded memory: a fragment that is too long is read over, never held.

And positions between the fragments from which reading can go on with a seek, also in compressed files of many members.
"""

from __future__ import annotations

from collections.abc import Iterator

from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.streams import Stream

_BLOCK = 1 << 18
#: A position is an offset in the file times this, plus a number of fragments: 63 bits hold 512 GB and 16 million fragments.
_FRAGMENTS = 1 << 24


class Marks:
    """A file on disk that is read fragment by fragment from a position on, and the positions behind its fragments.

    In a plain file a position is the byte behind a fragment. In a compressed one it is where the member (the gzip member, the
    frame, the stream) lies in the file in which the fragment begins, and how many fragments began in that member up to it.
    """

    def __init__(self, entry: Entry, position: int) -> None:
        self._first, self._skipped = divmod(position, _FRAGMENTS)
        self._is_compressed = entry.is_compressed
        self.stream: Stream = entry.open(member=self._first) if self._is_compressed else entry.open(self._first)
        self._member = self._first
        self._number = 0

    def begins(self, offset: int) -> bool:
        """Note that a fragment begins at `offset` of the stream; whether it lies behind the position that was started from.

        To be called for every fragment, in order.
        """
        if not self._is_compressed:
            return True
        member = self.stream.member_at(offset)[1]
        self._number = self._number + 1 if member == self._member else 1
        self._member = member
        return member != self._first or self._number > self._skipped

    def behind(self, end: int) -> int:
        """The position behind the fragment that began last, which ends at `end` of the stream."""
        if not self._is_compressed:
            return end * _FRAGMENTS
        # beyond the most fragments some would be read twice, with equal ids
        return self._member * _FRAGMENTS + min(self._number, _FRAGMENTS - 1)

    def where(self, offset: int) -> str:
        """What a note calls the place at `offset` of the stream: a byte of the file, wherever reading began."""
        if self._is_compressed:
            return f"in the member at byte {self.stream.member_at(offset)[1]:,}"
        return f"byte {offset:,}"


def bounded_lines(stream: Stream, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The lines of a stream from where it stands: where each begins, where it ends, and its bytes with the line end.

    A line over `limit` bytes is None: read over, never held.
    """
    offset = stream.tell()
    while line := stream.readline(limit + 1):
        end = offset + len(line)
        if len(line) > limit and not line.endswith(b"\n"):
            while rest := stream.readline(_BLOCK):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield offset, end, None
        elif len(line) > limit:
            yield offset, end, None
        else:
            yield offset, end, line
        offset = end


def fragments(stream: Stream, opening: bytes, closing: bytes, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The fragments of a stream from `opening` to the next `closing`, both included: begin, end, bytes.

    A fragment over `limit` bytes is None: read over, never held. What the stream's end cuts off is not yielded.
    """
    held = bytearray()
    # the offset of held[0]
    base = stream.tell()
    inside = too_long = False
    begin = searched = 0
    while True:
        wanted = closing if inside else opening
        at = held.find(wanted, searched)
        if at < 0:
            block = stream.read1(_BLOCK)
            if not block:
                return
            keep = max(len(wanted) - 1, 0)
            if not inside or too_long or len(held) > limit:
                too_long = inside
                drop = max(len(held) - keep, 0)
                del held[:drop]
                base += drop
            searched = max(len(held) - keep, 0)
            held += block
        elif not inside:
            del held[:at]
            base += at
            begin, inside, too_long, searched = base, True, False, len(opening)
        else:
            end = base + at + len(closing)
            yield begin, end, None if too_long or end - begin > limit else bytes(held[: at + len(closing)])
            del held[: at + len(closing)]
            base, inside, searched = end, False, 0
