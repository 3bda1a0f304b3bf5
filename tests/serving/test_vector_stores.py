"""Files and vector stores through OpenAI's own client, who may see what of them, and what stays on disk."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.serving.retrieval import stores, uploads
from bessemer.serving.retrieval.protocol import Comparison, Compound
from bessemer.serving.retrieval.stores import index_folders
from bessemer.serving.retrieval.uploads import read_form
from bessemer.serving.runtime.bodies import ApiError
from tests.retrieval.test_index import BagEmbedder
from tests.serving.documents import written_index, written_keys
from tests.serving.engine import FakeEngine, ScriptedEngine

pytest.importorskip("lancedb")

IRON = ("iron.md", b"# Iron\n\nIron rusts in water.\n")
COPPER = ('küpfer "1".txt', b"Copper turns green in air.\n")
PLANTED = b"wootz-5f1d-planted"


@pytest.fixture
def connect(connected, tmp_path, monkeypatch):
    """The official client of a server that keeps files in a folder, and searches them by words."""
    monkeypatch.setattr(stores, "packaged_minilm", lambda: None)
    return partial(connected, openai.OpenAI, path="/v1", uploads=tmp_path / "kept")


def test_files_are_uploaded_indexed_found_and_answered_from(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer, "Iron rusts in water [1]."))
    files = [client.files.create(file=file, purpose="assistants") for file in (IRON, COPPER)]
    assert [file.filename for file in files] == [IRON[0], COPPER[0]] and files[0].bytes == len(IRON[1])
    assert client.files.content(files[1].id).read() == COPPER[1]
    assert [file.id for file in client.files.list(limit=1)] == [file.id for file in reversed(files)]

    store = client.vector_stores.create(name="metals", metadata={"of": "me"})
    added = client.vector_stores.files.create_and_poll(
        files[0].id, vector_store_id=store.id, attributes={"year": 1856, "kind": "pure"}
    )
    assert added.status == "completed" and added.attributes == {"year": 1856, "kind": "pure"}
    batch = client.vector_stores.file_batches.create_and_poll(store.id, file_ids=[files[1].id])
    assert (batch.status, batch.file_counts.completed) == ("completed", 1)
    store = client.vector_stores.retrieve(store.id)
    assert (store.file_counts.completed, store.file_counts.total, store.status) == (2, 2, "completed")
    assert [one.id for one in client.vector_stores.list()] == [store.id]

    (hit,) = client.vector_stores.search(store.id, query="what rusts?")
    assert (hit.file_id, hit.filename, hit.content[0].text) == (files[0].id, "iron.md", "Iron rusts in water.")
    assert hit.attributes == {"year": 1856, "kind": "pure"} and 0 < hit.score <= 1
    both = client.vector_stores.search(store.id, query=["rusts", "green"])
    assert [one.filename for one in both] == [IRON[0], COPPER[0]]
    (passage,) = client.vector_stores.files.content(files[0].id, vector_store_id=store.id)
    assert passage.text == "Iron rusts in water." and IRON[1][passage.start : passage.end].decode() == passage.text

    tool = {"type": "file_search", "vector_store_ids": [store.id]}
    answer = client.responses.create(model="tiny", input="What rusts?", tools=[tool])
    (annotation,) = answer.output[1].content[0].annotations
    assert (annotation.file_id, annotation.filename, annotation.quote) == (files[0].id, "iron.md", "Iron rusts in water.")


def test_filters_choose_files_by_their_attributes(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer))
    store = client.vector_stores.create(name="all")
    for year, file in ((1856, IRON), (1700, ("old.md", b"Iron was dear."))):
        given = client.files.create(file=file, purpose="user_data")
        client.vector_stores.files.create_and_poll(given.id, vector_store_id=store.id, attributes={"year": year})

    def found(filters):
        return {hit.filename for hit in client.vector_stores.search(store.id, query="iron", filters=filters)}

    assert found({"type": "gte", "key": "year", "value": 1800}) == {"iron.md"}
    assert found({"type": "eq", "key": "month", "value": 1}) == set()
    client.vector_stores.files.update(given.id, vector_store_id=store.id, attributes={"year": 1900})
    assert found({"type": "gte", "key": "year", "value": 1800}) == {"iron.md", "old.md"}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"type": "eq", "key": "a", "value": 1}, True),
        ({"type": "eq", "key": "a", "value": True}, False),
        ({"type": "ne", "key": "missing", "value": "x"}, True),
        ({"type": "lt", "key": "b", "value": "y"}, True),
        ({"type": "lt", "key": "b", "value": 3}, False),
        ({"type": "gt", "key": "missing", "value": 0}, False),
        ({"type": "in", "key": "b", "value": ["x", "z"]}, True),
        ({"type": "nin", "key": "b", "value": ["x", "z"]}, False),
    ],
)
def test_a_condition_is_of_one_attribute(condition, holds):
    own = {"a": 1.0, "b": "x"}
    assert Comparison.model_validate(condition).holds(own) is holds
    both = {"type": "and", "filters": [condition, {"type": "or", "filters": [condition, condition]}]}
    assert Compound.model_validate(both).holds(own) is holds


def test_what_is_deleted_is_in_no_file_and_the_rest_is_there_after_a_restart(connect, tokenizer, tmp_path):
    client = connect(ScriptedEngine(tokenizer))
    store = client.vector_stores.create(name="all")
    secret = client.files.create(file=("secret.txt", b"Iron is called " + PLANTED), purpose="user_data")
    kept = client.files.create(file=IRON, purpose="user_data")
    client.vector_stores.file_batches.create_and_poll(store.id, file_ids=[secret.id, kept.id])
    assert holders(tmp_path)
    client.files.delete(secret.id)
    # not found from now on, and gone once the index was built without it
    assert [hit.filename for hit in client.vector_stores.search(store.id, query="iron")] == ["iron.md"]
    until = time.monotonic() + 20
    while holders(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.02)
    again = connect(ScriptedEngine(tokenizer))
    assert [file.id for file in again.vector_stores.files.list(store.id)] == [kept.id]
    assert [hit.filename for hit in again.vector_stores.search(store.id, query="iron")] == ["iron.md"]
    again.vector_stores.delete(store.id)
    with pytest.raises(openai.NotFoundError, match="there is no vector store"):
        again.vector_stores.retrieve(store.id)


def test_a_store_of_another_embedder_is_indexed_anew(connect, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "packaged_minilm", lambda: tmp_path)
    for identity in ("one bag", "another bag"):
        embedder = BagEmbedder()
        embedder.identity = identity
        monkeypatch.setattr(stores, "open_embedder", lambda name, embedder=embedder: embedder)
        client = connect(ScriptedEngine(tokenizer))
        if identity == "one bag":
            store = client.vector_stores.create(name="all")
            given = client.files.create(file=IRON, purpose="user_data")
            client.vector_stores.files.create_and_poll(given.id, vector_store_id=store.id)
    with pytest.raises(openai.InternalServerError, match="is being indexed anew"):
        client.vector_stores.search(store.id, query="iron water")
    until = time.monotonic() + 20
    while True:
        try:
            (hit,) = client.vector_stores.search(store.id, query="iron water")
            break
        except openai.InternalServerError:
            assert time.monotonic() < until
    assert hit.filename == "iron.md" and 0.5 < hit.score < 1 and embedder.embedded > 1


def holders(folder):
    """The files that hold the planted phrase."""
    found = []
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            # an index that is replaced goes while its files are read
            with suppress(FileNotFoundError):
                found += [path] if PLANTED in path.read_bytes() else []
    return found


def test_a_file_without_text_fails_with_a_reason_and_hinders_no_other(connect, tokenizer):
    client = connect(ScriptedEngine(tokenizer))
    store = client.vector_stores.create(name="all")
    reasons = {}
    for name, content in (
        ("blank.md", b" \n"),
        ("photo.png", b"\x89PNG\x00"),
        ("a.md.gz", b"\x1f\x8b"),
        ("plan.docx", b"PK garbage"),
        ("notes.log", b"Iron."),
    ):
        given = client.files.create(file=(name, content), purpose="user_data")
        file = client.vector_stores.files.create_and_poll(given.id, vector_store_id=store.id)
        reasons[name] = file.last_error.message if file.status == "failed" else file.status
    assert reasons == {
        "blank.md": "blank.md: no text is in it",
        "photo.png": "photo.png: files of this kind cannot be read",
        "a.md.gz": "a.md.gz: compressed files are not read",
        "plan.docx": "plan.docx: it is damaged (File is not a zip file)",
        "notes.log": "completed",
    }
    assert client.vector_stores.retrieve(store.id).file_counts.failed == 4


def test_files_and_stores_are_their_owners_and_an_index_shows_each_caller_their_groups(start, tmp_path):
    index = written_index(tmp_path / "index")
    url = start(FakeEngine(), indexes={"docs": index}, keys=written_keys(tmp_path))

    def ask(key, method, path, **more):
        return httpx.request(method, f"{url}/v1/{path}", headers={"Authorization": f"Bearer {key}"}, **more)

    upload = ask("ann", "POST", "files", files={"file": IRON}, data={"purpose": "user_data"}).json()["id"]
    own = ask("ann", "POST", "vector_stores", json={"file_ids": [upload]}).json()["id"]
    for path in (f"files/{upload}", f"files/{upload}/content", f"vector_stores/{own}", f"vector_stores/{own}/files/{upload}"):
        assert (ask("ann", "GET", path).status_code, ask("bob", "GET", path).status_code) == (200, 404), path
    assert ask("bob", "POST", "vector_stores", json={"file_ids": [upload]}).status_code == 404
    assert ask("bob", "GET", "files").json()["data"] == []

    listed = {key: ask(key, "GET", "vector_stores/docs/files").json()["data"] for key in ("ann", "bob")}
    assert {key: sorted(file["filename"] for file in files) for key, files in listed.items()} == {
        "ann": ["metal.md", "wages.md"],
        "bob": ["metal.md"],
    }
    counts = {key: ask(key, "GET", "vector_stores/docs").json() for key in ("ann", "bob")}
    assert counts["ann"]["file_counts"]["total"] == 2 and counts["bob"]["file_counts"]["total"] == 1
    assert counts["bob"]["usage_bytes"] == next(file["usage_bytes"] for file in listed["bob"])
    (wages,) = [file["id"] for file in listed["ann"] if file["filename"] == "wages.md"]
    for path in (f"vector_stores/docs/files/{wages}", f"vector_stores/docs/files/{wages}/content"):
        assert (ask("ann", "GET", path).status_code, ask("bob", "GET", path).status_code) == (200, 404)
    searched = {"query": "coins"}
    assert ask("ann", "POST", "vector_stores/docs/search", json=searched).json()["data"]
    assert ask("bob", "POST", "vector_stores/docs/search", json=searched).json()["data"] == []
    # an index of the server's is nobody's to change
    for method, path, body in (("DELETE", "vector_stores/docs", None), ("POST", "vector_stores/docs", {"name": "mine"})):
        assert ask("ann", method, path, json=body).status_code == 403


def test_a_form_is_read_to_the_byte():
    content = b"a\r\n--not the end\r\n\r\nb\n\x00"
    request = httpx.Request("POST", "http://x", files={"file": ('../näme "x".txt', content)}, data={"purpose": "user_data"})
    parts = read_form(request.headers["content-type"], request.read())
    assert parts["file"].content == content and parts["file"].filename == 'näme "x".txt'
    assert parts["purpose"].content == b"user_data"
    for kind, body in (("application/json", b"{}"), ("multipart/form-data; boundary=x", b"--x\r\n\r\n")):
        with pytest.raises(ApiError):
            read_form(kind, body)


def test_what_a_key_keeps_is_limited_and_a_wrong_upload_is_one_line(start, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "UPLOADS", uploads.UPLOADS._replace(most=1))
    url = start(FakeEngine(), uploads=tmp_path)
    for files, status in (({"file": ("a.md", b"")}, 400), ({"file": IRON}, 200), ({"file": IRON}, 400), ({"other": IRON}, 400)):
        answer = httpx.post(url + "/v1/files", files=files, data={"purpose": "user_data"})
        assert answer.status_code == status and answer.text.count("\n") == 0, answer.text
    assert httpx.get(url + "/v1/files?limit=0").status_code == 400
    assert httpx.get(url + "/v1/vector_stores/none/files/none/page?number=1").status_code == 404


def test_a_page_is_drawn_by_what_reads_the_document(start, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(stores, "packaged_minilm", lambda: None)
    monkeypatch.setattr("bessemer.serving.retrieval.api.page_image", lambda *given: drawn.append(given) or b"\x89PNG")
    url = start(FakeEngine(), uploads=tmp_path)
    upload = httpx.post(url + "/v1/files", files={"file": ("a.txt", b"Iron.")}).json()["id"]
    store = httpx.post(url + "/v1/vector_stores", json={"file_ids": [upload]}).json()["id"]
    place = f"{url}/v1/vector_stores/{store}/files/{upload}/page"
    answer = httpx.get(place, params={"number": 2, "box": "1,2,3.5,4"})
    assert (answer.headers["content-type"], answer.content) == ("image/png", b"\x89PNG")
    ((path, number, box),) = drawn
    assert path.read_bytes() == b"Iron." and path.suffix == ".txt" and (number, box) == (2, (1, 2, 3.5, 4))
    for wrong in ({"number": "x"}, {"box": "1,2,3"}, {"box": "nan,1,2,3"}):
        assert httpx.get(place, params=wrong).status_code == 400


def test_names_of_indexes_come_from_their_folders(tmp_path):
    first, second = written_index(tmp_path / "docs.index"), written_index(tmp_path / "more")
    assert index_folders([str(first), f"other={second}"]) == {"docs": first, "other": second}
    with pytest.raises(ConfigError, match="another index is called 'docs'"):
        index_folders([str(first), f"docs={second}"])
    with pytest.raises(ConfigError, match="is no name"):
        index_folders([f"a b={second}"])
    with pytest.raises(ArtefactError, match="no index of documents is here"):
        index_folders([str(tmp_path)])
