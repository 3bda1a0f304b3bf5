from __future__ import annotations

import email
import subprocess
import sys

import pytest

from bessemer.core.errors import ConfigError, SourceError, StorageError
from bessemer.data.sources import docs as lock_module
from bessemer.data.sources.docs import (
    DownloadError,
    Pin,
    cached_wheel,
    fetch_wheels,
    license_of,
    lock_path,
    read_lock,
    read_wheel,
    readable_page,
)
from bessemer.data.sources.source import Tally
from tests.data.conftest import sha256


@pytest.fixture
def offline_index(wheel, monkeypatch):
    """pip finds wheels in a folder, and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def test_docstrings_and_pages_become_documents_and_tests_and_licences_do_not(wheel):
    locators = [document.locator for document in read_wheel(wheel, Tally())]
    assert locators == [
        "Ingot-Tools/ingot/__init__.py#",
        "Ingot-Tools/ingot/files.py#",
        "Ingot-Tools/ingot/files.py#Ingot",
        "Ingot-Tools/ingot/files.py#Ingot.__init__",
        "Ingot-Tools/ingot/files.py#Ingot.price",
        "Ingot-Tools/ingot/files.py#Ingot.melt",
        "Ingot-Tools/ingot/files.py#cast",
        "Ingot-Tools/ingot/files.py#cast@2",
        "Ingot-Tools/Ingot-Tools.md",
        "Ingot-Tools/ingot/guide.rst",
    ]


def test_a_document_says_where_it_comes_from(wheel):
    document = next(found for found in read_wheel(wheel, Tally()) if found.locator.endswith("Ingot.melt"))
    assert (document.license, document.url, document.group) == ("MIT", "https://example.org/ingot", "Ingot-Tools")
    assert document.metadata == {
        "package": "Ingot-Tools",
        "version": "1.2",
        "kind": "method",
        "module": "ingot.files",
        "qualname": "Ingot.melt",
        "signature": "melt(self, temperature=1538.0, /, *others, **options)",
    }


def test_a_module_that_does_not_parse_is_counted_and_named(wheel):
    tally = Tally()
    list(read_wheel(wheel, tally))
    assert tally.counts["unparseable_files"] == 1
    assert "ingot/broken.py" in tally.notes[0]


def test_a_file_that_is_not_a_wheel_is_named(tmp_path):
    path = tmp_path / "a-1-py3-none-any.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(SourceError, match="not a readable wheel"):
        list(read_wheel(path, Tally()))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("License: BSD", "BSD"),
        ("License: " + "long " * 30 + "\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("Classifier: Topic :: Text", None),
    ],
)
def test_the_licence_is_read_from_the_most_exact_field(headers, expected):
    assert license_of(email.message_from_string(headers + "\n\n")) == expected


def test_badges_and_images_are_not_part_of_a_page():
    page = (
        "# Name\n\n[![a](b)](c) ![d](e)\n<p align='center'>\n  .. image:: x.png\n     :alt: y\n\n\n\nText with ![inline](f).\n"
    )
    assert readable_page(page) == "# Name\n\nText with ![inline](f)."


def test_the_shipped_lock_pins_every_package_by_hash():
    pins = read_lock(lock_path("quickstart", lock_module._SHIPPED))
    assert len(pins) > 20
    assert all(pin.sha256 for pin in pins)


def test_an_unknown_lock_is_met_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        lock_path("quikstart", tmp_path)


@pytest.mark.parametrize("line", ["sympy", "sympy>=1", "sympy==1.14", "sympy==1.14 --hash=md5:00"])
def test_a_line_without_version_and_hash_is_refused(tmp_path, line):
    (tmp_path / "a.lock").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"'sympy.*' is not pinned"):
        read_lock(tmp_path / "a.lock")


def test_an_empty_lock_is_refused(tmp_path):
    (tmp_path / "a.lock").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(SourceError, match="names no packages"):
        read_lock(tmp_path / "a.lock")


def test_pip_fetches_what_is_not_in_the_cache_and_only_then(lock, tmp_path, offline_index, monkeypatch, wheel):
    pins, cache = read_lock(lock), tmp_path / "cache"
    assert [path.name for path in fetch_wheels(pins, cache)] == [wheel.name]
    assert [path.name for path in cache.iterdir()] == [wheel.name]
    monkeypatch.setattr(lock_module, "_download", lambda *_: pytest.fail("fetched again"))
    fetch_wheels(pins, cache)


def test_a_damaged_wheel_in_the_cache_is_fetched_again(lock, tmp_path, pip, wheel):
    pins, cache = read_lock(lock), tmp_path / "cache"
    cache.mkdir()
    (cache / wheel.name).write_bytes(b"half")
    assert cached_wheel(pins[0], cache) is None
    (path,) = fetch_wheels(pins, cache)
    assert sha256(path) in pins[0].sha256


def test_a_file_with_another_hash_than_the_locks_is_refused(tmp_path, offline_index):
    cache = tmp_path / "cache"
    with pytest.raises(DownloadError, match="another hash than the lock's"):
        fetch_wheels([Pin("ingot-tools", "1.2", frozenset({"0" * 64}))], cache)
    assert list(cache.iterdir()) == []


def test_a_disk_that_fills_up_is_not_taken_for_a_missing_index(lock, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 2, "", "ERROR: Exception:\nTraceback:\nOSError: [Errno 28] No space left on device\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StorageError, match="the disk is full"):
        fetch_wheels(read_lock(lock), tmp_path / "cache")


def test_without_an_index_the_reason_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match=r"sympy 1.14.0: the package index cannot be reached") as error:
        fetch_wheels([Pin("sympy", "1.14.0", frozenset({"0" * 64}))], tmp_path)
    assert "\n" not in str(error.value)


def test_asking_for_pip_leaves_setuptools_importable():
    code = "from bessemer.data.sources import docs; assert docs.has_pip(); import setuptools"
    subprocess.run([sys.executable, "-c", code], check=True)
