"""Rules of who may see which documents, from a file to a search."""

from __future__ import annotations

import pytest

from bessemer.core.errors import ConfigError
from bessemer.retrieval.access import access_of, read_access, with_access
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.search import search
from bessemer.retrieval.store import Filter
from tests.retrieval.test_commands import run

pytest.importorskip("lancedb")

PLACES = ("hr/wages.md#0", "hr/holidays.md#0", "metal.md#3")


def rules_of(tmp_path, text):
    path = tmp_path / "access.yaml"
    path.write_text(text, encoding="utf-8")
    return read_access(path)


def groups_by(rules):
    return [one.groups for one in with_access([IndexedDocument(place, "iron") for place in PLACES], rules)]


def test_the_last_rule_that_fits_a_document_holds(tmp_path):
    rules = rules_of(tmp_path, "hr/*: [hr, managers]\nhr/holidays.md: everybody\n")
    assert groups_by(rules) == [("hr", "managers"), (), ()]
    closed = rules_of(tmp_path, '"*": staff\nmetal.md: everybody\n')
    assert groups_by(closed) == [("staff",), ("staff",), ()]
    list(with_access([IndexedDocument(place, "iron") for place in PLACES], closed, tmp_path))
    assert access_of(tmp_path) == closed and access_of(tmp_path / "none") == ()


def test_a_rule_that_fits_no_document_leaves_the_index_as_it_was(tmp_path):
    rules = rules_of(tmp_path, "hr/*: [hr]\nrh/*: [rh]\n")
    documents = [IndexedDocument(place, "iron") for place in PLACES]
    build_index(with_access(documents, rules[:1]), tmp_path / "index", IndexConfig(embedder="none"))
    with pytest.raises(ConfigError, match=r"the rule rh/\* fits no document"):
        build_index(with_access(documents, rules), tmp_path / "index")
    index = open_index(tmp_path / "index")
    found = {hit.passage.document for hit in search(index, "iron", where=Filter(groups=frozenset()))}
    # three documents of one text are one hit, and neither of those of hr
    assert found == {"metal.md#3"}


@pytest.mark.parametrize("text", ["hr/*: []\n", "hr/*: {a: b}\n", "hr/*: [a, 3]\n", "hr/*: ['a b']\n", "# nothing\n"])
def test_what_is_no_rule_is_named_with_its_place(tmp_path, text):
    with pytest.raises(ConfigError, match=r"access\.yaml:1: hr/\*: name groups|no rule is here"):
        rules_of(tmp_path, text)


def test_rules_are_kept_for_updates_until_they_are_taken_away(tmp_path, capsys):
    docs, out, access = tmp_path / "docs", tmp_path / "index", tmp_path / "access.yaml"
    (docs / "hr").mkdir(parents=True)
    (docs / "hr" / "wages.md").write_text("The director is paid in iron.\n", encoding="utf-8")
    (docs / "metal.md").write_text("Iron rusts.\n", encoding="utf-8")
    access.write_text("hr/*: [hr]\n", encoding="utf-8")
    seen = []
    for more in (["--access", str(access)], [], ["--access", "none"]):
        code, _, _ = run(capsys, "index", str(docs), str(out), "--embedder", "none", *more)
        guest = Filter(groups=frozenset({"guest"}))
        seen.append((code, len(search(open_index(out), "director iron", where=guest))))
        (docs / "hr" / "wages.md").write_text("The director is paid in copper and iron.\n", encoding="utf-8")
    assert seen == [(0, 1), (0, 1), (0, 2)]
    code, _, error = run(capsys, "index", str(docs), str(out), "--access", str(tmp_path / "none.yaml"))
    assert code == 2 and "none.yaml" in error and error.count("\n") == 1
