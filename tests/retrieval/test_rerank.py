"""Rerankers: a cross-encoder's scores beside `transformers`, a language model's beside its own logits, a server's; and searches
that are ordered by them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.core.http_client import ApiError
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.rerank import CrossEncoder, HeadingReranker, ServerReranker, open_reranker
from bessemer.retrieval.search import search
from tests.chat_server import serving
from tests.model.random_encoders import KINDS, written
from tests.serving.running import babbling_engine

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "<pad>", "[CLS]", "[SEP]", "[UNK]", "iron", "rusts", "in", "water", "copper", "turns", "green", "what"]
PASSAGES = ["iron rusts in water", "copper", "copper turns green " * 12, "iron rusts in water and air"]


def cross_encoder(kind, folder, labels=1):
    """A random classifier over pairs with a tokenizer of words; theirs, and their tokenizer."""
    model = written(kind, folder, transformers.AutoModelForSequenceClassification, num_labels=labels)
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = 1 if kind == "bert" else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    pad = WORDS[model.config.pad_token_id]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token=pad)
    return model, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_cross_encoders_scores_are_those_of_transformers_and_its_activation_the_folders(tmp_path, kind):
    model, tokenizer = cross_encoder(kind, tmp_path)
    query = "what rusts in water"
    longest = 40 - (2 if "roberta" in kind or kind == "mpnet" else 0)  # whose positions begin behind that of padding
    pairs = tokenizer(
        [query] * len(PASSAGES),
        PASSAGES,
        padding=True,
        truncation=True,
        max_length=longest,
        return_tensors="pt",
        return_token_type_ids=True,
    )
    assert pairs["input_ids"].shape[1] == longest, "one of the passages is cut"
    given = {name: pairs[name] for name in ("input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else []))}
    with torch.no_grad():
        logits_N = model(**given).logits[:, 0]
    assert np.abs(CrossEncoder(tmp_path).scores(query, PASSAGES) - logits_N.sigmoid().numpy()).max() < 1e-5
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert np.abs(open_reranker(str(tmp_path)).scores(query, PASSAGES) - logits_N.numpy()).max() < 1e-5


def test_a_model_that_gives_a_pair_no_single_score_is_refused(tmp_path):
    cross_encoder("bert", tmp_path, labels=3)
    with pytest.raises(ArtefactError, match="gives a pair one score, and its classifier has 3"):
        CrossEncoder(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtefactError, match="it has no classifier"):
        CrossEncoder(tmp_path)
    for name, reason in (("nowhere", "no such folder or file"), ("http://127.0.0.1:1/v1", "say which model behind the URL")):
        with pytest.raises(ConfigError, match=reason):
            open_reranker(name)


@torch.no_grad()
def test_a_language_models_scores_are_the_log_probabilities_of_the_headings(tmp_path):
    engine = babbling_engine(tmp_path)
    reranker = HeadingReranker(engine)
    passages = ["iron.rust(water, *, air)\nText.", "Copper\nOther text."]
    scores_N = reranker.scores("does iron rust", passages)
    for score, heading in zip(scores_N, ("iron.rust", "Copper"), strict=True):
        ids = [*engine.tokenizer.encode(heading, add_bos=False), *engine.tokenizer.encode("\n", add_bos=False)]
        whole = [*reranker._prompt("does iron rust"), *ids]
        log_probs_TV = engine.model(torch.tensor([whole]))[0].float().log_softmax(-1)
        start = len(whole) - len(ids)
        expected = sum(log_probs_TV[place - 1, whole[place]].item() for place in range(start, len(whole)))
        assert score == pytest.approx(expected, abs=5e-3)
    with pytest.raises(RequestError, match="shorten it"):
        reranker.scores("x y z " * 500, ["iron"])


def test_a_servers_scores_are_put_in_the_order_of_the_passages(monkeypatch):
    answers = {
        "ranked": {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.2}]},
        "short": {"results": [{"index": 1, "relevance_score": 0.9}]},
        "other": {"data": []},
    }
    with serving(monkeypatch) as start:
        server = start(lambda body, _: (200, {}, json.dumps(answers[body["model"]]).encode()))
        assert open_reranker(f"{server.url}#ranked").scores("q", ["a", "b"]).tolist() == pytest.approx([0.2, 0.9])
        (path, _, body) = server.requests[0]
        assert path == "/v1/rerank" and body == {"model": "ranked", "query": "q", "documents": ["a", "b"], "top_n": 2}
        with pytest.raises(ApiError, match="1 of 2 passages have no score"):
            ServerReranker(server.url, "short").scores("q", ["a", "b"])
        with pytest.raises(ApiError, match="holds no scores"):
            ServerReranker(server.url, "other").scores("q", ["a"])


class LongestFirst:
    weight = None

    def scores(self, query, passages):
        return np.array([len(passage) for passage in passages], np.float32)


def test_a_search_is_ordered_by_the_reranker_also_what_was_not_among_the_first(tmp_path):
    pytest.importorskip("lancedb")
    documents = [
        IndexedDocument(f"{number}.md", f"Iron. {' '.join(f'w{number}x{place}' for place in range(number))}")
        for number in range(12)
    ]
    build_index(documents, tmp_path / "i", IndexConfig(embedder="none"))
    plain = search(open_index(tmp_path / "i"), "iron", 3)
    hits = search(open_index(tmp_path / "i", reranker=LongestFirst()), "iron", 3)
    lengths = [len(hit.passage.shown) for hit in hits]
    assert lengths == sorted(lengths, reverse=True) and hits[0].passage.document == "11.md"
    assert "11.md" not in [hit.passage.document for hit in plain]
    assert hits[0].score == lengths[0] and [hit.ranks["reranked"] for hit in hits] == [1, 2, 3]
    assert "words rank" in hits[0].explanation and "reranked rank 1 (score" in hits[0].explanation


def test_a_reranker_with_a_weight_adds_to_the_score_of_the_searches(tmp_path):
    pytest.importorskip("lancedb")
    documents = [IndexedDocument("a.md", "Iron iron iron."), IndexedDocument("b.md", "Iron and much else in a longer text.")]
    build_index(documents, tmp_path / "i", IndexConfig(embedder="none"))
    plain = {hit.passage.id: hit.score for hit in search(open_index(tmp_path / "i"), "iron", 2)}
    for weight, first in ((0.0, "a.md"), (1.0, "b.md")):
        reranker = LongestFirst()
        reranker.weight = weight
        hits = search(open_index(tmp_path / "i", reranker=reranker), "iron", 2)
        assert hits[0].passage.document == first
        for hit in hits:
            assert hit.score == pytest.approx(plain[hit.passage.id] + weight * len(hit.passage.shown))
