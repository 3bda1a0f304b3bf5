"""The sources that are not files of one format: wheels, the standard library, a user's function; and `files` in archives."""

from __future__ import annotations

import pytest

from bessemer.core.errors import SourceError
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.formats.files import files_source
from bessemer.data.sources.origins import python_docs
from bessemer.data.sources.origins.python_docs import PythonDocs, read_python_docs
from bessemer.data.sources.origins.user import UserFunction
from bessemer.data.sources.origins.wheels import Wheels, read_wheel
from bessemer.data.sources.source import counted
from tests.data.sources.makers import assert_resumes, found, tar, zipped


def test_wheels_are_units_whose_documents_are_those_of_the_wheel(tmp_path, lock, wheel, pip):
    source = Wheels(lock, tmp_path / "cache")
    read = [document for _, _, document in assert_resumes(source)]
    assert read == list(read_wheel(wheel, Tally()))


def test_what_is_met_before_a_position_is_not_tallied_again(tmp_path, lock, pip):
    source = Wheels(lock, tmp_path / "cache")
    whole = Tally()
    everything = found(source, whole)
    for stop in range(len(everything) + 1):
        both = Tally()
        unit = source.units()[0]
        reader = source.read(unit, 0, both)
        position = 0
        for _ in range(stop):
            position, _ = next(reader)
        reader.close()
        list(source.read(unit, position, both)) if stop else list(source.read(unit, 0, both))
        assert (both.counts, both.notes) == (whole.counts, whole.notes)


def test_the_standard_library_is_one_unit(monkeypatch):
    package = python_docs._standard_library() / "asyncio"
    monkeypatch.setattr(python_docs, "_standard_library", lambda: package)
    source = PythonDocs()
    (unit,) = source.units()
    first = [document for _, document in zip(range(50), (d for _, d in source.read(unit, 0, Tally())), strict=False)]
    assert first == [document for _, document in zip(range(50), read_python_docs(Tally()), strict=False)]


def test_a_users_function_is_one_unit_that_resumes(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(count):\n    for n in range(count):\n        yield {'id': n, 'text': f'text {n}'}\n"
    )
    source = UserFunction("mine.py:f", tmp_path, {"count": 5})
    assert [document.text for _, _, document in assert_resumes(source)] == [f"text {n}" for n in range(5)]


@pytest.mark.parametrize(
    ("body", "message"), [("raise RuntimeError('no')", "RuntimeError: no"), ("return [{}]", "needs a 'text'")]
)
def test_a_users_function_that_fails_is_named(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def f():\n    {body}\n")
    with pytest.raises(SourceError, match=message):
        found(UserFunction("mine.py:f", tmp_path))


def test_text_and_records_in_archives_are_those_of_the_files(tmp_path):
    files = {"a/x.txt": b"One.\n\nTwo.\n", "b.jsonl": b'{"id": 1, "text": "r"}\n', "c.png": b"\x89PNG"}
    for name, content in (("p.zip", zipped(files)), ("q.tar.gz", tar(files, "w:gz"))):
        (tmp_path / name).write_bytes(content)
    read = [document for _, _, document in assert_resumes(files_source(["."], tmp_path, 100))]
    (p_text, p_record, q_text, q_record) = [document.locator for document in read]
    assert (p_text, q_text) == ("p.zip/a/x.txt#0", "q.tar/a/x.txt#0")
    assert p_record == q_record and p_record.startswith("id:1:")


def test_counted_positions_are_numbers_of_documents():
    def documents(tally):
        for n in range(4):
            tally.counts["met"] += 1
            yield Document(str(n), f"text {n}")

    tally = Tally()
    assert [(position, document.locator) for position, document in counted(documents, 2, tally)] == [(3, "2"), (4, "3")]
    assert tally.counts == {"met": 2}
