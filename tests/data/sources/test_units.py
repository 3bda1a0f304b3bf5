"""The sources that are not files of one format: wheels, the standard library, a user's function; and `files` in archives."""

from __future__ import annotations

import pytest

from bessemer.core.errors import SourceError
from bessemer.data.sources import python_docs
from bessemer.data.sources.docs import Wheels, read_wheel
from bessemer.data.sources.io.fetch import Clock
from bessemer.data.sources.python_docs import PythonDocs, read_python_docs
from bessemer.data.sources.source import Document, Tally, counted
from bessemer.data.sources.user import UserFunction
from tests.data.sources.makers import assert_resumes, files_source, found, tar, zipped


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
        "def f(count):\n    for n in range(count):\n        yield {'id': n, 'text': f'text {n}'}\n", encoding="utf-8"
    )
    source = UserFunction("mine.py:f", tmp_path, {"count": 5})
    assert [document.text for _, _, document in assert_resumes(source)] == [f"text {n}" for n in range(5)]


@pytest.mark.parametrize(
    ("body", "message"), [("raise RuntimeError('no')", "RuntimeError: no"), ("return [{}]", "needs a 'text'")]
)
def test_a_users_function_that_fails_is_named(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def f():\n    {body}\n", encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        found(UserFunction("mine.py:f", tmp_path))


FAILS_NOW_AND_THEN = """
calls = []

def f(errors):
    calls.append(len(calls))
    for number in range(4):
        if number == 2 and len(calls) <= errors:
            raise ConnectionError("no route")
        yield {"text": f"text {number}"}
"""


@pytest.mark.parametrize(("errors", "texts"), [(0, 4), (3, 4), (9, 2)])
def test_a_users_function_that_a_network_fails_is_called_again_after_growing_waits(tmp_path, errors, texts):
    (tmp_path / "mine.py").write_text(FAILS_NOW_AND_THEN, encoding="utf-8")
    waits, tally = [], Tally()
    source = UserFunction("mine.py:f", tmp_path, {"errors": errors}, clock=Clock(sleep=waits.append))
    (unit,) = source.units()
    assert [document.text for _, document in source.read(unit, 0, tally)] == [f"text {n}" for n in range(texts)]
    assert waits == [1.0, 2.0, 4.0][:errors]
    assert tally.counts == ({} if texts == 4 else {"failed_functions": 1})


def test_an_iterator_that_fails_without_end_is_given_up(tmp_path):
    body = "import itertools\n\ndef f():\n    return map(lambda n: {'text': 'x'[n]}, itertools.count())\n"
    (tmp_path / "mine.py").write_text(body, encoding="utf-8")
    tally, source = Tally(), UserFunction("mine.py:f", tmp_path)
    assert [document.text for _, document in source.read(source.units()[0], 0, tally)] == ["x"]
    assert tally.counts == {"bad_records": 99, "failed_functions": 1}


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
