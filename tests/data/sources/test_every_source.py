"""What holds for every source: it resumes, it can be sent elsewhere, and no damage ends it."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.data.sources.registry import SOURCES, source_plugin
from bessemer.data.sources.source import Tally
from tests.cases import slow
from tests.data.sources.makers import assert_resumes, documents, examples, found, opened

EXAMPLES = examples()
NAMES = [f"{kind}-{name}" for kind, name, _ in EXAMPLES]
#: Of those that work in a helper process one, LaTeX; a dump's pages are read on from in `test_wikis_and_forums.py`.
OTHERS_SLOW = [slow(*example) if example[0] in ("pdf", "mediawiki") else example for example in EXAMPLES]


@pytest.mark.parametrize(("kind", "name", "content"), OTHERS_SLOW, ids=NAMES)
def test_reading_goes_on_behind_any_document_as_if_it_had_never_stopped(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(content)
    assert_resumes(opened(kind, tmp_path))


@pytest.mark.parametrize(("kind", "name", "content"), EXAMPLES, ids=NAMES)
def test_whole_input_gives_documents_and_nothing_to_report(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(content)
    tally = Tally()
    assert documents(kind, tmp_path, tally)
    assert tally.notes == []
    assert tally.bytes == len(content)


@pytest.mark.parametrize(("kind", "name", "content"), OTHERS_SLOW, ids=NAMES)
def test_locators_are_unique(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(content)
    locators = [document.locator for document in documents(kind, tmp_path)]
    assert len(set(locators)) == len(locators)


@pytest.mark.parametrize(("kind", "name", "content"), OTHERS_SLOW, ids=NAMES)
def test_a_source_and_its_units_can_be_sent_to_another_process(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(content)
    source = opened(kind, tmp_path)
    (unit,) = source.units()
    sent, sent_unit = pickle.loads(pickle.dumps((source, unit)))
    assert list(sent.read(sent_unit, 0, Tally())) == list(source.read(unit, 0, Tally()))


@pytest.mark.parametrize(("kind", "name", "content"), EXAMPLES, ids=NAMES)
def test_an_empty_file_is_counted_and_named(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(b"")
    tally = Tally()
    assert documents(kind, tmp_path, tally) == []
    assert sum(tally.counts.values()) == 1
    assert tally.notes[0].startswith(name)


SLOW_TO_START = ("pdf", "mediawiki", "latex")  # a helper process each: damaged on fewer places


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [e for e in EXAMPLES if e[0] not in SLOW_TO_START],
    ids=[n for n in NAMES if n.split("-")[0] not in SLOW_TO_START],
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_ends_the_run(tmp_path, kind, name, content, data):
    hurt(tmp_path, kind, name, content, data)


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [slow(*e) if e[0] == "mediawiki" else e for e in EXAMPLES if e[0] in SLOW_TO_START],
    ids=[n for n in NAMES if n.split("-")[0] in SLOW_TO_START],
)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_ends_the_run_of_those_that_work_in_a_helper(tmp_path, kind, name, content, data):
    hurt(tmp_path, kind, name, content, data)


def hurt(folder, kind, name, content, data):
    """Cut a file off, turn bits in it, or put other bytes into it; whatever is read of it must be read without raising."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at:at] = data.draw(st.binary(max_size=30))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    (folder / name).write_bytes(damaged)
    tally = Tally()
    for document in (document for _, _, document in found(opened(kind, folder), tally)):
        document.text.encode()
        document.locator.encode()
        assert document.text.strip()
    assert all("\n" not in note for note in tally.notes)


def test_settings_load_no_heavy_library():
    code = (
        "import sys; import bessemer.data.sources.registry; "
        "print([name for name in ('pyarrow', 'lxml', 'fastwarc', 'numpy', 'zstandard', 'protego') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if "paths" in source_plugin(kind).settings.model_fields])
def test_one_path_may_stand_for_a_list(kind):
    assert source_plugin(kind).settings.parse({"paths": "a"}).paths == ["a"]


def test_urls_need_something_to_fetch():
    with pytest.raises(ConfigError, match="needs `urls`, `lists` or `sitemaps`"):
        source_plugin("urls").settings.parse({})
