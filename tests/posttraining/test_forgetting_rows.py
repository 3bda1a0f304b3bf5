"""The stage `forgetting`: rows of what is forgotten and of what is kept."""

import json

import pyarrow as pa
import pytest

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.corpus.writer import write_documents
from bessemer.data.sources.canaries import alike_canaries, copies, planted_canaries, unseen_canaries
from bessemer.data.sources.registry import CanariesSource, open_source
from bessemer.data.sources.source import Tally
from bessemer.posttraining.synthetic.config import ForgettingConfig
from bessemer.posttraining.synthetic.forgetting import forgetting

CANARIES = CanariesSource(draws=2, repetitions=[1, 3], replaced=0.2, words=10, suffix_words=3)
LONG = " ".join(f"word{n}" for n in range(55))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Planted canaries among twenty documents, one of them long."""
    folder = tmp_path_factory.mktemp("forgetting")
    source = open_source(CANARIES, folder, folder)
    rows = [
        (one.text, "canaries", list(one.metadata.items()))
        for unit in source.units()
        for _, one in source.read(unit, 0, Tally())
    ]
    rows += [(f"Furnace {n} is hot and old and made of iron.\n\nIt glows.", "files", []) for n in range(19)] + [
        (LONG, "files", [])
    ]
    ids = [hash_bytes(str(number).encode()) for number in range(len(rows))]
    nothing = [None] * len(rows)
    columns = {
        "id": ids,
        "text": [text for text, _, _ in rows],
        "text_hash": ids,
        "source": [source for _, source, _ in rows],
        "url": nothing,
        "language": nothing,
        "license": nothing,
        "split": ["train"] * len(rows),
        "metadata": [metadata for _, _, metadata in rows],
    }
    write_documents(folder / "documents", [pa.table(columns, schema=SCHEMA)])
    return folder / "documents", dict(zip((text for text, _, _ in rows), ids, strict=True))


def made(corpus, out, **settings):
    counts = forgetting(ForgettingConfig(**settings), corpus[0], out, seed=3)
    rows = [json.loads(line) for line in (out / "forgetting.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {label: [row["prompt"] + row["completion"] for row in rows if row["label"] == label] for label in (False, True)}
    assert counts == {"documents": counts["documents"], "forget": len(texts[False]), "keep": len(texts[True])}
    return texts, rows


def test_copies_are_one_row_and_near_copies_one_each(corpus, tmp_path):
    texts, rows = made(corpus, tmp_path, sources=["canaries"], keep=5)
    planted = {text for canary in planted_canaries(CANARIES) for text in copies(CANARIES, canary)}
    assert sorted(texts[False]) == sorted(planted) and len(texts[True]) == 5
    assert all(len(row["prompt"].split()) == 4 and not row["prompt"].startswith(" ") for row in rows)


def test_alike_are_canaries_that_were_neither_planted_nor_are_candidates(corpus, tmp_path):
    texts, _ = made(corpus, tmp_path, sources=["canaries"], keep=5, alike=7)
    assert texts[True][5:] == [canary.text for canary in alike_canaries(CANARIES, 7)]
    others = {canary.text for canary in [*planted_canaries(CANARIES), *unseen_canaries(CANARIES, 500)]}
    assert not others & set(texts[True])


def test_a_document_is_forgotten_by_its_id_in_pieces(corpus, tmp_path):
    texts, _ = made(corpus, tmp_path, ids=[corpus[1][LONG]], keep=100, words=20)
    assert [len(text.split()) for text in texts[False]] == [20, 20, 15]
    assert " ".join(text.strip() for text in texts[False]) == LONG
    assert len(texts[True]) == 19 + sum(canary.repetitions for canary in planted_canaries(CANARIES))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": ["0" * 32]}, "no document to train on has the id or the source"),
        ({"sources": ["letters"]}, "'letters'"),
        ({"sources": ["files"], "alike": 3}, "none is to be forgotten; leave it out"),
        ({"sources": ["files", "canaries"]}, "too few words"),
    ],
)
def test_what_is_not_there_is_one_line(corpus, tmp_path, settings, message):
    with pytest.raises(SourceError, match=message):
        made(corpus, tmp_path, **settings)


def test_nothing_named_is_refused():
    with pytest.raises(ConfigError, match="name ids or sources of documents to forget"):
        ForgettingConfig.parse({"keep": 3}, "forgetting")
