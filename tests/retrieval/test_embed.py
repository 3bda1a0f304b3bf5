"""Embedders: what a folder says of its use, beside the hidden states of `transformers`; a language model's; a server's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.http_client import ApiError
from bessemer.retrieval.embed import EncoderEmbedder, EngineEmbedder, ServerEmbedder, open_embedder
from tests.serving.engine import FakeEngine
from tests.serving.running import babbling_engine, servers

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "iron", "rusts", "in", "water", "copper", "turns", "green", "find", ":"]
TEXTS = ["iron rusts in water", "copper", "copper turns green in water in water"]


@pytest.fixture
def folder(tmp_path):
    """A random BERT with a tokenizer of words; `written(**files)` adds what sentence-transformers says, as JSON."""
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def says(folder, pooling=None, dense=None, prompts=None, longest=None):
    """What `sentence-transformers` writes beside an encoder."""
    steps = [("Transformer", "")]
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
        steps.append(("Pooling", "1_Pooling"))
    if dense is not None:
        (folder / "2_Dense").mkdir(exist_ok=True)
        config = {"in_features": 16, "out_features": 6, "activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file({"linear.weight": dense[0], "linear.bias": dense[1]}, folder / "2_Dense" / "model.safetensors")
        steps.append(("Dense", "2_Dense"))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in [*steps, ("Normalize", "3")]]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}), encoding="utf-8")


def states(folder, text, longest=32):
    """The hidden states of a text alone, by transformers."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    ids = ids if len(ids) <= longest else [*ids[: longest - 1], 2]
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def unit(vector):
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [
        (None, lambda states_TD: states_TD.mean(0)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda states_TD: states_TD.mean(0)),
        ({"pooling_mode_cls_token": True, "word_embedding_dimension": 16}, lambda states_TD: states_TD[0]),
        ({"pooling_mode": "max"}, lambda states_TD: states_TD.amax(0)),
    ],
)
def test_a_vector_is_the_states_pooled_as_the_folder_says_whatever_is_embedded_beside_it(folder, pooling, pooled):
    if pooling is not None:
        says(folder, pooling)
    vectors_ND = EncoderEmbedder(folder).embed(TEXTS, "document")
    expected_ND = [unit(pooled(states(folder, text))) for text in TEXTS]
    assert np.abs(vectors_ND - expected_ND).max() < 1e-5


def test_prompts_length_and_a_matrix_behind_the_pooling_are_the_folders(folder):
    weight_ED, bias_E = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), torch.ones(6)
    says(folder, {"pooling_mode_mean_tokens": True}, (weight_ED, bias_E), {"query": "find : "}, longest=5)
    embedder = open_embedder(str(folder))
    assert embedder.width == 6
    for side, text in (("query", "find : iron rusts in water"), ("document", "iron rusts in water")):
        mean_D = states(folder, text, longest=5).mean(0)
        expected_E = unit(torch.tanh(weight_ED @ mean_D + bias_E))
        assert np.abs(embedder.embed(["iron rusts in water"], side)[0] - expected_E).max() < 1e-5


def test_a_prompt_called_passage_is_that_of_documents(folder):
    says(folder, prompts={"passage": "text : "})
    expected_D = unit(states(folder, "text : iron rusts").mean(0))
    assert np.abs(EncoderEmbedder(folder).embed(["iron rusts"], "document")[0] - expected_D).max() < 1e-5


def test_an_identity_changes_with_how_a_model_is_used(folder):
    plain = EncoderEmbedder(folder).identity
    assert EncoderEmbedder(folder).identity == plain
    says(folder, {"pooling_mode_cls_token": True})
    assert EncoderEmbedder(folder).identity != plain


def test_what_a_folder_asks_and_is_not_known_is_refused(folder):
    says(folder, {"pooling_mode_weightedmean_tokens": True})
    with pytest.raises(ArtefactError, match="pooling by weightedmean_tokens is not known"):
        EncoderEmbedder(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.CNN", "path": "1"}]), encoding="utf-8"
    )
    with pytest.raises(ArtefactError, match="the step CNN is not known"):
        EncoderEmbedder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtefactError, match=r"tokenizer\.json"):
        EncoderEmbedder(folder)
    for name, reason in (("nowhere", "no such folder"), ("http://127.0.0.1:1/v1", "say which model behind the URL")):
        with pytest.raises(ConfigError, match=reason):
            open_embedder(name)


def test_a_language_models_vectors_are_those_that_its_server_gives(tmp_path):
    engine = babbling_engine(tmp_path)
    own = EngineEmbedder(tmp_path / "model")
    with servers() as start:
        served = open_embedder(f"{start(engine)}/v1#tiny")
        vectors_ND = served.embed(TEXTS, "document")
        assert served.width == own.width and np.abs(vectors_ND - own.embed(TEXTS, "document")).max() < 1e-5
        assert np.abs(np.linalg.norm(vectors_ND, axis=1) - 1).max() < 1e-5
        with pytest.raises(ApiError, match="the model 'other' does not exist"):
            ServerEmbedder(served._client.url, "other").embed(["iron"], "query")


def test_a_server_that_is_not_there_is_asked_again_and_then_named(monkeypatch):
    waits = []
    monkeypatch.setattr("bessemer.core.http_client.time.sleep", waits.append)
    with servers() as start:
        url = start(FakeEngine())
    with pytest.raises(ApiError, match=r"cannot be reached .*, 5 times"):
        ServerEmbedder(f"{url}/v1", "tiny").embed(["iron"], "query")
    assert len(waits) == 4
