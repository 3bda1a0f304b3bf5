from __future__ import annotations

import bz2
import gzip
import io
import lzma
import resource
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.sources.io.file_source import bounded_lines, fragments
from bessemer.data.sources.io.paths import compression_of, uncompressed_name
from bessemer.data.sources.io.streams import open_stream, stream_of, whole_gzip_member
from tests.cases import slow_but

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": lambda data: bz2.compress(data, 1),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
TEXT = b"".join(b"line %d of a text about steel\n" % n for n in range(20_000))


def opened(content, name="a"):
    return stream_of(io.BytesIO(content), name, 0)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_follow_each_other_and_padding_is_no_damage(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT) + COMPRESS[suffix](b"more") + b"\0" * 512)
    with open_stream(path) as stream:
        assert stream.read() == TEXT + b"more"
        assert stream.damage is None
        assert stream.verified == len(TEXT) + 4


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_member_is_found_again_by_its_place(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT) + COMPRESS[suffix](b"more"))
    with open_stream(path) as stream:
        stream.read()
        begin, member = stream.member_at(len(TEXT) + 1)
    assert begin == len(TEXT)
    with open_stream(path, member=member) as stream:
        assert stream.read() == b"more"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_stands_before_a_cut_is_kept(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    packed = COMPRESS[suffix](TEXT)
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with open_stream(path) as stream:
        data = stream.read()
        assert stream.damage.kind == "damaged_files"
    assert TEXT.startswith(data)
    assert len(data) > len(TEXT) // 8


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_turned_bit_is_noticed(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    packed = bytearray(
        COMPRESS[suffix](TEXT) if suffix != ".zst" else zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
    )
    packed[len(packed) // 2] ^= 16
    path.write_bytes(packed)
    with open_stream(path) as stream:
        stream.read()
        assert stream.damage is not None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_reading_goes_on_behind_a_damaged_member(tmp_path, suffix):
    members = [bytearray(COMPRESS[suffix](b"member %d\n" % n * 50)) for n in range(5)]
    members[1] = members[1][: len(members[1]) // 2]
    members[3][len(members[3]) // 2] ^= 0xFF
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"".join(members))
    with open_stream(path) as stream:
        data = stream.read()
        for _ in range(2):
            assert stream.damage is not None
            assert stream.go_on()
            data += stream.read()
        assert stream.damage is None
    assert [n for n in range(5) if data.count(b"member %d\n" % n) == 50] == [0, 2, 4]


@pytest.mark.parametrize("suffix", slow_but([".gz", ".zst"], COMPRESS))
def test_a_bomb_ends_early_on_little_memory(tmp_path, suffix):
    """90 MB of zeros, of which memory must not hold much; in a process of its own, whose peak can be asked."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(90_000_000)))
    code = f"""
import resource
from pathlib import Path
from bessemer.data.sources.io.streams import open_stream
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_stream(Path({str(path)!r})) as stream:
    size = sum(map(len, iter(lambda: stream.read(1 << 20), b"")))
    print(size, stream.damage.kind, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    size, kind, kilobytes = done.stdout.split()
    assert int(size) < 90_000_000
    assert kind == "decompression_bombs"
    assert int(kilobytes) < 60_000


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 20))
def test_lines_are_those_of_the_library_and_long_ones_are_read_over(content, limit):
    lines = list(bounded_lines(opened(content), limit))
    expected = io.BytesIO(content).readlines()
    assert [line for _, _, line in lines] == [line if len(line) <= limit else None for line in expected]
    assert [(begin, end) for begin, end, _ in lines] == [
        (sum(map(len, expected[:n])), sum(map(len, expected[: n + 1]))) for n in range(len(expected))
    ]


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"<p>", b"</p>", b"text", b"<", b"p>", b"</p"]), max_size=20), st.integers(7, 20))
def test_fragments_are_those_of_a_regular_expression(pieces, limit):
    import re

    content = b"".join(pieces)
    expected = [
        (match.start(), match.end(), match[0] if len(match[0]) <= limit else None)
        for match in re.finditer(rb"<p>.*?</p>", content, re.S)
    ]
    assert list(fragments(opened(content), b"<p>", b"</p>", limit)) == expected


def test_a_long_line_is_read_over_on_bounded_memory(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(b"one\n")
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b"\ntwo\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_stream(path) as stream:
        assert [line for _, _, line in bounded_lines(stream, 1 << 20)] == [b"one\n", None, b"two\n"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    ("name", "compression", "plain"),
    [("a.txt", "", "a.txt"), ("a.txt.GZ", ".gz", "a.txt"), ("a.tgz", ".gz", "a.tar"), ("a.tar.zst", ".zst", "a.tar")],
)
def test_a_name_tells_its_compression(name, compression, plain):
    assert (compression_of(name), uncompressed_name(name)) == (compression, plain)


def test_one_whole_gzip_member_is_told_from_less_and_more():
    member = gzip.compress(b"text")
    assert whole_gzip_member(member)
    assert not any(map(whole_gzip_member, [b"", member[:-1], member + member, b"text"]))
