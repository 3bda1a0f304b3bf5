"""Pairs that prefer "I don't know" exactly where no document answers."""

import json
import re

import pytest

from bessemer.core.errors import SourceError
from bessemer.posttraining.data.examples import read_examples
from bessemer.posttraining.data.formats import as_pair
from bessemer.posttraining.synthetic.config import HonestyConfig
from bessemer.posttraining.synthetic.documentation import HONESTY_FILE, honesty
from tests.training.conftest import documentation, write_documentation


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Functions of three packages, some of the same name, and a package that is held out."""
    rows = []
    for number, (text, package, metadata) in enumerate(documentation(120)):
        name = package if package == "held" else f"pack{number % 3}"
        rows.append((text.replace("known.", f"{name}."), package, [("package", name), *metadata[1:]]))
    return write_documentation(tmp_path_factory.mktemp("honesty") / "documents", rows)


def test_ignorance_is_preferred_where_the_package_has_no_such_function(documents, tmp_path):
    config = HonestyConfig(pairs=60, unknown_share=0.4, unsure=["No idea.", "I don't know.", "I cannot say."])
    metrics = honesty(config, documents, tmp_path, seed=2)
    assert metrics == {"pairs": 60, "known": 36, "unknown": 24}
    rows = [json.loads(line) for line in (tmp_path / HONESTY_FILE).open(encoding="utf-8")]
    documented = {f"{dict(metadata)['qualname']}" for _, _, metadata in documentation(120)}
    # the functions' numbers say which package has them
    for row in rows:
        name, package = (re.search(pattern, row["prompt"][0]["content"])[1] for pattern in (r"`(\w+)`", r"(pack\d|held)"))
        assert name in documented
        has_it = package == f"pack{int(name.rpartition('_')[2]) % 3}"
        assert row["known"] == has_it
        assert (row["rejected"] if has_it else row["chosen"]) in config.unsure
        assert (row["chosen"] if has_it else row["rejected"]) not in config.unsure
    # whatever is asked: a phrase of each kind of question would tell the kind
    for kind in ("What does", "What is", "Which module"):
        of_kind = [row for row in rows if not row["known"] and row["prompt"][0]["content"].startswith(kind)]
        assert len(of_kind) < 4 or {row["chosen"] for row in of_kind} == set(config.unsure)
    assert {row["chosen"] for row in rows if not row["known"]} == set(config.unsure)
    assert len(read_examples(tmp_path / HONESTY_FILE, as_pair)) == 60
    honesty(config, documents, tmp_path, seed=2)
    assert [json.loads(line) for line in (tmp_path / HONESTY_FILE).open(encoding="utf-8")] == rows


def test_documents_of_one_package_have_no_question_without_an_answer(tmp_path):
    rows = [row for row in documentation(24) if row[1] == "known"]
    documents = write_documentation(tmp_path / "documents", rows)
    with pytest.raises(SourceError, match=r"it gives \d+ questions that it answers and 0 that it does not; both need"):
        honesty(HonestyConfig(), documents, tmp_path, seed=1)
