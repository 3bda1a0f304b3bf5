"""Streams cut into lines and fragments on bounded memory: a piece that is too long is read over, never held."""

from __future__ import annotations

from collections.abc import Iterator

from bessemer.data.sources.streams import Stream

_BLOCK = 1 << 18


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
    """The pieces of a stream from `opening` to the next `closing`, both included: begin, end, bytes.

    A piece over `limit` bytes is None: read over, never held. What the stream's end cuts off is not yielded.
    """
    held = bytearray()
    base = stream.tell()  # the offset of held[0]
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
