"""Reranking and scoring in the forms of Cohere, Jina and vLLM."""

from __future__ import annotations

import httpx
import pytest

from bessemer.retrieval.index import IndexedDocument
from bessemer.serving.retrieval.rerank import CosineReranker, RerankRequest, ScoreRequest
from bessemer.serving.runtime.bodies import ApiError, read_request
from tests.retrieval.test_index import BagEmbedder
from tests.serving.documents import written_index
from tests.serving.running import babbling_engine

TEXTS = ["the end", "in the thin", "9"]


class Overlap:
    """Scores texts by the words that they share with the query."""

    weight = None

    def scores(self, query, texts):
        return [float(len(set(query.split()) & set(text.split()))) for text in texts]


@pytest.fixture
def engine(tmp_path):
    return babbling_engine(tmp_path)


def test_a_servers_own_reranker_orders_texts_in_all_three_forms(engine, start):
    with httpx.Client(base_url=start(engine, reranker=("overlap", Overlap()))) as client:
        body = {"model": "overlap", "query": "the thin end", "documents": [*TEXTS, {"text": "end of the thin"}], "top_n": 2}
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            answer = client.post(path, json=body).json()
            assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == [(3, 3.0), (0, 2.0)]
            assert answer["results"][0]["document"] == {"text": "end of the thin"} and answer["usage"]["total_tokens"] > 0
        plain = client.post("/v1/rerank", json=body | {"return_documents": False}).json()["results"]
        assert all(one.keys() == {"index", "relevance_score"} for one in plain)
        asked = {"/v1/score": {"text_1": "the end", "text_2": TEXTS}, "/score": {"queries": "the end", "documents": TEXTS}}
        for path, more in asked.items():
            answer = client.post(path, json={"model": "overlap", **more}).json()
            assert [(one["index"], one["object"], one["score"]) for one in answer["data"]] == [
                (0, "score", 2.0), (1, "score", 1.0), (2, "score", 0.0),
            ]  # fmt: skip
        pairs = client.post("/v1/score", json={"model": "overlap", "text_1": ["9", "the"], "text_2": ["9", "x"]}).json()
        assert [one["score"] for one in pairs["data"]] == [1.0, 0.0]


def test_a_servers_reranker_orders_what_its_searches_find(engine, start, tmp_path):
    pytest.importorskip("lancedb")
    # by BM25 the shorter one is better
    texts = ["iron", "the iron is hot in the furnace"]
    documents = [IndexedDocument(str(number), text) for number, text in enumerate(texts)]
    indexes = {"metals": written_index(tmp_path / "index", *documents)}
    orders = []
    for reranker in (None, ("overlap", Overlap())):
        url = start(engine, reranker=reranker, indexes=indexes, uploads=tmp_path / "kept")
        with httpx.Client(base_url=url + "/v1") as client:
            found = client.post("/vector_stores/metals/search", json={"query": "is the iron"}).json()["data"]
            file = client.post("/files", files={"file": ("all.md", "# A\n\niron\n\n# B\n\nthe iron is hot in the furnace\n")})
            own = client.post("/vector_stores", json={"name": "own", "file_ids": [file.json()["id"]]}).json()["id"]
            while client.get(f"/vector_stores/{own}").json()["status"] != "completed":
                pass
            own_found = client.post(f"/vector_stores/{own}/search", json={"query": "is the iron"}).json()["data"]
        orders.append([[hit["content"][0]["text"] for hit in hits] for hits in (found, own_found)])
    assert orders == [[texts, texts], [texts[::-1], texts[::-1]]]


def test_a_language_model_scores_by_cosines_of_its_embeddings(engine, start):
    url = start(engine)
    vectors = engine.embed([engine.tokenizer.encode(text) for text in ["the end", *TEXTS]]).numpy()
    expected = (vectors[1:] @ vectors[0]).tolist()
    found = httpx.post(url + "/v1/score", json={"model": "tiny", "text_1": "the end", "text_2": TEXTS}).json()
    assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-5)
    ranked = httpx.post(url + "/v1/rerank", json={"model": "tiny", "query": "the end", "documents": TEXTS}).json()["results"]
    assert [one["index"] for one in ranked] == sorted(range(3), key=lambda place: -expected[place])
    unknown = httpx.post(url + "/v1/rerank", json={"model": "other", "query": "a", "documents": ["b"]})
    assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "model"


def test_cosines_of_an_embedder_are_products_of_its_vectors():
    embedder = BagEmbedder()
    reranker = CosineReranker(lambda texts, _: embedder.embed(texts, "document"))
    assert reranker.scores("iron rusts", ["iron rusts", "iron", "gold"]) == pytest.approx([1, 0.5**0.5, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "body", "parameter"),
    [
        (RerankRequest, b'{"model": "a", "query": "", "documents": ["b"]}', "query"),
        (RerankRequest, b'{"model": "a", "query": "b", "documents": []}', "documents"),
        (RerankRequest, b'{"model": "a", "query": "b", "documents": [{"title": "c"}]}', "documents[0]"),
        (ScoreRequest, b'{"model": "a", "text_1": "b"}', "text_1"),
        (ScoreRequest, b'{"model": "a", "text_1": ["b", "c"], "text_2": ["d"]}', "text_1"),
    ],
)
def test_a_wrong_request_names_its_parameter(kind, body, parameter):
    with pytest.raises(ApiError) as refused:
        read_request(kind, body)
    assert refused.value.parameter == parameter
