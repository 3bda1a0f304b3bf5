"""An index of documents: found by words and by meaning, updated, and whole at any moment."""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.core.progress import PlainLines
from bessemer.retrieval import index as indexes
from bessemer.retrieval import store as stores
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index, passages_of
from bessemer.retrieval.search import NAMES_WEIGHT, WORDS_WEIGHT, fused, search
from bessemer.retrieval.store import Filter, Found, Passage
from bessemer.retrieval.terms import searched_words

pytest.importorskip("lancedb")


class BagEmbedder:
    """A vector of words: equal words, near vectors. `synonyms` mean the same."""

    identity = "bag of words"
    width = 64

    def __init__(self):
        self.embedded = 0

    def embed(self, texts, side):
        self.embedded += len(texts)
        vectors = np.zeros((len(texts), self.width), np.float32)
        for row, text in enumerate(texts):
            for word in searched_words(text).lower().split():
                vectors[row, zlib.crc32({"automobile": "car"}.get(word, word).encode()) % self.width] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


DOCUMENTS = [
    IndexedDocument("metal.md", "# Iron\n\nIron rusts in water.\n\n# Copper\n\nCopper turns green.", "Metals", "notes"),
    IndexedDocument("car.md", "A car has four wheels and an engine.", "Cars", "notes"),
    IndexedDocument("json.py#json.loads", "Deserialize a str with a JSON document.", "json.loads(s)", "python"),
    IndexedDocument("secret.md", "The launch code is 0000.", "Codes", "notes", groups=("staff",)),
]


@pytest.fixture
def made(tmp_path):
    embedder = BagEmbedder()
    summary = build_index(DOCUMENTS, tmp_path / "index", embedder=embedder)
    assert (summary.documents, summary.added) == (4, 4)
    return open_index(tmp_path / "index", embedder)


def places(hits):
    return [hit.passage.document for hit in hits]


def test_a_passage_is_found_by_its_words_by_its_meaning_and_by_both(made):
    assert places(search(made, "rust in water", 1, mode="words")) == ["metal.md"]
    assert places(search(made, "automobile", 1, mode="meaning")) == ["car.md"]
    (hit,) = search(made, "what does loads do in json", 1)
    assert hit.passage.document == "json.py#json.loads" and hit.ranks == {"words": 1, "meaning": 1}
    assert hit.score == pytest.approx(1 + WORDS_WEIGHT) and "words rank 1 (BM25" in hit.explanation


def test_a_fused_score_is_that_worked_by_hand():
    def found(name, kind, rank, score):
        return Found(Passage(name, name, 0, "", "", name, 0, 1, "notes"), {kind: rank}, {kind: score})

    words = [found("a", "words", 1, 8.0), found("b", "words", 2, 2.0)]
    meaning = [found("b", "meaning", 1, 0.7), found("c", "meaning", 2, 0.6), found("d", "meaning", 3, 0.2)]
    scores = {hit.passage.id: hit.score for hit in fused(words, meaning, 0.5)}
    assert scores == pytest.approx({"b": 1 + 0.5 * 0.25, "c": 0.8, "a": 0.5, "d": 0.0})
    assert [hit.passage.id for hit in fused(words, [], 0.5)] == ["a", "b"] and fused([], meaning[:1], 0.5)[0].score == 1


def test_a_query_with_a_name_in_it_goes_by_words(made):
    by_words, by_meaning = ("car", "engine"), "automobile"
    (hit,) = search(made, f"{by_meaning} json.loads", 1)
    assert hit.passage.document == "json.py#json.loads" and hit.score >= NAMES_WEIGHT
    assert places(search(made, " ".join(by_words), 1)) == ["car.md"]


def test_the_first_hits_are_the_same_however_many_are_wanted(made):
    assert places(search(made, "iron car json", 1)) == places(search(made, "iron car json", 4))[:1]


def test_a_hit_has_its_headings_and_its_bytes(made):
    (hit,) = search(made, "turns green", 1)
    assert (hit.passage.title, hit.passage.headings, hit.passage.text) == ("Metals", "Copper", "Copper turns green.")
    assert DOCUMENTS[0].text.encode()[hit.passage.start : hit.passage.end] == b"Copper turns green."


def test_what_a_principal_may_not_see_is_not_found(made):
    assert "secret.md" in places(search(made, "launch code", 5))
    for groups in (frozenset(), frozenset({"guests"}), frozenset({"it's"})):
        assert "secret.md" not in places(search(made, "launch code", 5, where=Filter(groups=groups)))
    assert places(search(made, "launch code", 1, where=Filter(groups=frozenset({"staff"})))) == ["secret.md"]


def test_a_filter_leaves_the_order_of_the_others(made):
    assert set(places(search(made, "iron car json", 9, where=Filter(sources=["python"])))) == {"json.py#json.loads"}
    assert set(places(search(made, "iron car json", 9, where=Filter(documents=["metal.md", "car*"])))) == {"metal.md", "car.md"}


def test_cosines_of_an_approximate_index_are_those_of_whole_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "APPROXIMATE_ABOVE", 100)
    embedder = BagEmbedder()
    texts = [f"word{number} and word{number % 7} of text{number % 11}" for number in range(300)]
    build_index([IndexedDocument(text, text) for text in texts], tmp_path / "i", embedder=embedder)
    made = open_index(tmp_path / "i", embedder)
    assert [index.index_type for index in made.store._table.list_indices()] == ["IvfPq"]
    (vector,) = embedder.embed(["word3 and text5"], "query")
    found = made.store.by_meaning(vector, 20)
    exact = [float(vector @ embedder.embed([one.passage.shown], "document")[0]) for one in found]
    assert [one.scores["meaning"] for one in found] == pytest.approx(exact, abs=1e-5) and exact[0] > 0.7


def test_passages_are_embedded_some_at_a_time_with_a_sign_after_each_and_find_the_same(made, tmp_path, monkeypatch):
    monkeypatch.setattr(indexes, "_EMBEDDED_AT_ONCE", 2)
    told, embedder = io.StringIO(), BagEmbedder()
    build_index(DOCUMENTS, tmp_path / "parts", embedder=embedder, progress=PlainLines(told, interval=0))
    assert [line.split(" passages")[0] for line in told.getvalue().splitlines() if "embed: " in line][:3] == [
        "  embed: 2/5",
        "  embed: 4/5",
        "  embed: 5/5",
    ]
    hits = [search(index, "automobile", 4, mode="meaning") for index in (made, open_index(tmp_path / "parts", embedder))]
    assert hits[0] == hits[1] and embedder.embedded == 5 + 1


def test_an_update_embeds_what_is_new_alone_and_forgets_what_is_gone(made, tmp_path):
    embedder = BagEmbedder()
    changed = [
        DOCUMENTS[0],
        IndexedDocument("car.md", "A car has five wheels.", "Cars", "notes"),
        IndexedDocument("new.md", "Tin."),
    ]
    summary = build_index(changed, made.folder, embedder=embedder)
    assert (summary.added, summary.changed, summary.deleted, embedder.embedded) == (1, 1, 2, 2)
    now = open_index(made.folder, embedder)
    assert len(now.store) == summary.passages == 4
    assert search(now, "wheels", 1)[0].passage.text == "A car has five wheels."
    assert not [place for place in places(search(now, "launch code json", 9)) if place.startswith(("secret", "json"))]
    # who has the version before open still reads it
    assert search(made, "launch code", 1)[0].passage.document == "secret.md"
    again = build_index(changed, made.folder, embedder=embedder)
    assert (again.added, again.changed, again.deleted, embedder.embedded) == (0, 0, 0, 4)


@pytest.mark.parametrize("moment", ["write", "copy", "finish", "swap"])
def test_an_update_that_is_killed_leaves_the_old_version_and_is_gone_on_with(made, monkeypatch, moment):
    changed = [DOCUMENTS[0], DOCUMENTS[1], IndexedDocument("new.md", "Tin melts early."), IndexedDocument("newer.md", "Lead.")]
    monkeypatch.setattr(indexes, "_CHARACTERS_AT_ONCE", 5)
    kinds = {"write": (indexes.StoreWriter, "add"), "copy": (indexes.StoreWriter, "copy")}
    owner, name = kinds.get(moment, (indexes.StoreWriter, "finish") if moment == "finish" else (indexes._Build, "_swap"))
    original, calls = getattr(owner, name), []

    def killed(*arguments):
        calls.append(1)
        if moment == "write" and len(calls) == 1:
            return original(*arguments)
        if moment == "copy":
            # half of what is to be copied
            original(arguments[0], list(arguments[1])[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, killed)
    embedder = BagEmbedder()
    with pytest.raises(KeyboardInterrupt):
        build_index(changed, made.folder, embedder=embedder)
    old = open_index(made.folder, embedder)
    assert places(search(old, "launch code", 1)) == ["secret.md"] and "new.md" not in places(search(old, "tin", 9))
    before = embedder.embedded
    monkeypatch.setattr(owner, name, original)
    summary = build_index(changed, made.folder, embedder=embedder)
    assert (summary.documents, summary.added, summary.deleted) == (4, 2, 2)
    assert embedder.embedded - before <= (1 if moment == "write" else 0) + 1
    now = open_index(made.folder, embedder)
    assert len(now.store) == summary.passages == 5 and places(search(now, "tin", 1)) == ["new.md"]


@pytest.mark.parametrize("words", ['{"format": 1, "size": 4, "terms": 0, "starts": 0, "rows": 0, "scores": 0}', "{"])
def test_words_of_an_earlier_version_or_damaged_ones_are_made_anew_without_embedding(tmp_path, words):
    build_index(DOCUMENTS, tmp_path / "index", embedder=BagEmbedder())
    head = next((tmp_path / "index").glob("versions/*/words/words.json"))
    now = head.read_text(encoding="utf-8")
    head.write_text(words, encoding="utf-8")
    embedder = BagEmbedder()
    build_index(DOCUMENTS, tmp_path / "index", embedder=embedder)
    assert not embedder.embedded
    assert places(search(open_index(tmp_path / "index", embedder), "rust in water", 1, mode="words")) == ["metal.md"]
    assert next((tmp_path / "index").glob("versions/2/words/words.json")).read_text(encoding="utf-8") == now


def test_a_first_build_that_was_killed_is_gone_on_with_beside_what_its_sources_fetched(tmp_path, monkeypatch):
    out, embedder = tmp_path / "i", BagEmbedder()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(indexes._Build, "_swap", killed)
        build_index(DOCUMENTS, out, embedder=embedder)
    (out / indexes.CACHE).mkdir()
    assert build_index(DOCUMENTS, out, embedder=embedder).documents == 4 and embedder.embedded == 5


def test_a_document_of_headings_alone_is_counted_as_empty_and_changes_nothing_later(tmp_path):
    documents, config = [*DOCUMENTS, IndexedDocument("bare.md", "# Only a heading\n")], IndexConfig(embedder="none")
    first = build_index(documents, tmp_path / "i", config)
    again = build_index(documents, tmp_path / "i", config)
    assert (first.documents, first.added, first.empty) == (4, 4, 1)
    assert (again.added, again.changed, again.empty) == (0, 0, 1)
    assert json.loads((tmp_path / "i" / "index.json").read_text(encoding="utf-8"))["version"] == 1
    assert [path.name for path in (tmp_path / "i" / "versions").iterdir()] == ["1"]


def test_a_document_that_only_repeats_its_title_has_no_passage():
    def texts(title, text):
        return [passage.text for passage in passages_of(IndexedDocument("d", text, title), IndexConfig())]

    assert texts("json.make_scanner.parse_int", "parse_int") == texts("Thank you", "# Thank you\n\nThank you") == []
    assert (
        texts("", "steel") == ["steel"]
        and texts("steel", "Steel, rolled.") == ["Steel, rolled."]
        and texts("", "***") == ["***"]
    )


def test_copies_of_a_passage_are_one_hit(tmp_path):
    text = "The same long sentence about iron and its rust stands in two files of the folder."
    documents = [IndexedDocument(name, text) for name in ("a.md", "b.md")] + [IndexedDocument("c.md", "Iron and tin.")]
    build_index(documents, tmp_path / "i", IndexConfig(embedder="none"))
    assert len(search(open_index(tmp_path / "i"), "iron rust", 5)) == 2


def test_neighbours_widen_a_hit_without_doubling_what_they_share(tmp_path):
    text = " ".join(f"Sentence number {number} about topic{number}." for number in range(30))
    config = IndexConfig(embedder="none", passage_characters=200, overlap_characters=60)
    build_index([IndexedDocument("a", text)], tmp_path / "i", config)
    (hit,) = search(open_index(tmp_path / "i"), "topic15", 1, neighbours=1)
    assert text.encode()[hit.passage.start : hit.passage.end].decode() == hit.passage.text
    assert len(hit.passage.text) > 300


def test_vectors_of_another_embedder_are_refused_and_made_anew_by_the_next_build(made, tmp_path):
    other = BagEmbedder()
    other.identity = "another bag"
    with pytest.raises(ArtefactError, match="vectors of two models do not compare"):
        open_index(made.folder, other)
    build_index(DOCUMENTS, made.folder, embedder=other)
    assert other.embedded == 5 and open_index(made.folder, other).embedder is other


def test_what_is_no_index_or_has_nothing_in_it_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no index of documents is here"):
        open_index(tmp_path)
    with pytest.raises(ConfigError, match="no document with text"):
        build_index([IndexedDocument("a", " \n")], tmp_path / "i", IndexConfig(embedder="none"))
    with pytest.raises(ConfigError, match="two documents are called 'a'"):
        build_index([IndexedDocument("a", "x"), IndexedDocument("a", "y")], tmp_path / "j", IndexConfig(embedder="none"))
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "thesis.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtefactError, match="files here that are no index"):
        build_index(DOCUMENTS, tmp_path / "k", IndexConfig(embedder="none"))
    build_index(DOCUMENTS, tmp_path / "m", IndexConfig(embedder="none"))
    made = open_index(tmp_path / "m")
    for query, reason in ((" ", "is empty"), ("x" * 30_000, "30,000 characters")):
        with pytest.raises(RequestError, match=reason):
            search(made, query)
    with pytest.raises(RequestError, match="no vectors"):
        search(made, "iron", mode="meaning")
    (tmp_path / "m" / "index.json").write_text(json.dumps({"format": 99, "version": 1, "config": {}}), encoding="utf-8")
    with pytest.raises(ArtefactError, match="newer than"):
        open_index(tmp_path / "m")
