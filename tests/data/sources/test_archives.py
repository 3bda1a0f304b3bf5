from __future__ import annotations

import io
import tarfile
import zipfile

import pytest

from bessemer.data.sources.source import Tally
from tests.data.sources.makers import assert_resumes, documents, opened, page, tar, zipped

HTML = page("<p>A page about steel.</p>")


def test_members_are_named_below_their_archive_whatever_compresses_it(tmp_path):
    for number, (name, mode) in enumerate([("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(tar({"x/a.html": HTML, "x/b.css": b"no page"}, mode))
        assert [document.locator for document in documents("html", folder)] == ["a.tar/x/a.html"]


def test_members_of_a_zip_may_be_compressed_themselves(tmp_path):
    import gzip

    (tmp_path / "a.zip").write_bytes(zipped({"x.html.gz": gzip.compress(HTML)}))
    assert [document.locator for document in documents("html", tmp_path)] == ["a.zip/x.html"]


@pytest.mark.parametrize("name", ["../../out.html", "/etc/out.html", "a/../../out.html", "C:/out.html", "..\\out.html"])
@pytest.mark.parametrize("make", [zipped, tar])
def test_a_member_whose_name_leads_out_is_set_aside_and_the_others_are_read(tmp_path, name, make):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"a.{'zip' if make is zipped else 'tar'}").write_bytes(make({name: HTML, "fine.html": HTML}))
    before = sorted(tmp_path.rglob("*"))
    tally = Tally()
    assert [document.metadata["file"].rpartition("/")[2] for document in documents("html", folder, tally)] == ["fine.html"]
    assert tally.counts == {"unsafe_members": 1}
    assert "leads out of the archive" in tally.notes[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_set_aside(tmp_path, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.html")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    tally = Tally()
    assert documents("html", tmp_path, tally) == []
    assert tally.counts == {"unsafe_members": 1}


def test_a_link_in_a_zip_is_set_aside(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member = zipfile.ZipInfo("a.html")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    tally = Tally()
    assert documents("html", tmp_path, tally) == []
    assert tally.counts == {"unsafe_members": 1}


def test_what_a_tar_holds_before_it_is_cut_off_is_kept(tmp_path):
    whole = tar({f"{n}.html": HTML for n in range(10)})
    (tmp_path / "a.tar").write_bytes(whole[: 1024 * 5 + 300])
    tally = Tally()
    assert len(documents("html", tmp_path, tally)) == 5
    assert tally.counts == {"damaged_files": 1}


def test_a_damaged_header_in_the_middle_of_a_tar_is_not_taken_for_its_end(tmp_path):
    whole = bytearray(tar({f"{n}.html": HTML for n in range(10)}))
    whole[1024 * 4 + 3] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(whole)
    tally = Tally()
    assert len(documents("html", tmp_path, tally)) == 4
    assert tally.counts == {"damaged_files": 1}


def test_one_damaged_member_of_a_zip_costs_one_document(tmp_path):
    whole = bytearray(zipped({f"{n}.html": HTML + bytes(str(n), "ascii") * 50 for n in range(5)}))
    whole[whole.index(b"2.html") + 20] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(whole)
    tally = Tally()
    assert len(documents("html", tmp_path, tally)) == 4
    assert tally.notes[0].startswith("a.zip/2.html: ")


def test_members_that_share_their_bytes_are_a_bomb(tmp_path, monkeypatch):
    """Ten thousand directory entries that all point at one member of 1 MB: the archive is small, what it yields is not."""
    import bessemer.data.sources.io.archives as archives

    monkeypatch.setattr(archives, "_FREE_BYTES", 5 << 20)
    monkeypatch.setattr(archives, "_MOST_EXPANSION", 10)
    member = zipped({"0.html": page("<p>" + "steel " * 170_000 + "</p>")})
    with zipfile.ZipFile(io.BytesIO(member)) as archive:
        start = archive.start_dir
    entry = member[start : member.rindex(b"PK\x05\x06")]
    count = 10_000
    end = bytearray(member[member.rindex(b"PK\x05\x06") :])
    end[8:12] = count.to_bytes(2, "little") * 2
    end[12:16] = (len(entry) * count).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(member[:start] + entry * count + bytes(end))
    tally = Tally()
    source = opened("html", tmp_path)
    (unit,) = source.units()
    read = sum(1 for _ in source.read(unit, 0, tally))
    assert tally.counts["decompression_bombs"] == 1
    assert 0 < read < 30


def test_an_encrypted_member_is_counted(tmp_path):
    whole = bytearray(zipped({"a.html": HTML, "b.html": HTML}))
    directory = whole.index(b"PK\x01\x02")
    whole[directory + 8] |= 1
    (tmp_path / "a.zip").write_bytes(whole)
    tally = Tally()
    assert len(documents("html", tmp_path, tally)) == 1
    assert tally.counts == {"encrypted_files": 1}


def test_small_files_are_read_in_bundles_and_large_ones_and_archives_alone(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03d}.html").write_bytes(HTML)
    (tmp_path / "010.zip").write_bytes(zipped({"a.html": HTML}))
    units = opened("html", tmp_path).units()
    assert sorted(len(unit.files) for unit in units) == [1, 44, 256]
    assert {name for unit in units for name, _ in unit.files} == {path.name for path in tmp_path.iterdir()}
    assert len({unit.name for unit in units}) == len(units)


def test_reading_goes_on_inside_a_bundle(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.html").write_bytes(page(f"<p>Page {number}</p>") if number != 3 else b"")
    assert len(assert_resumes(opened("html", tmp_path))) == 5


def test_a_file_that_vanishes_between_listing_and_reading_is_counted(tmp_path):
    (tmp_path / "a.html").write_bytes(HTML)
    (tmp_path / "b.html").write_bytes(HTML)
    source = opened("html", tmp_path)
    (unit,) = source.units()
    (tmp_path / "a.html").unlink()
    tally = Tally()
    assert len(list(source.read(unit, 0, tally))) == 1
    assert tally.counts == {"unreadable_files": 1}
