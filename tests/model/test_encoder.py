"""Encoders beside `transformers`: the same hidden states and scores, whatever is padded."""

from __future__ import annotations

import json

import pytest
import torch

from bessemer.core.errors import ArtefactError
from bessemer.model.encoder import load_encoder, read_encoder_config
from tests.model.random_encoders import KINDS, SMALL, written

transformers = pytest.importorskip("transformers")


def batch():
    ids_BT = torch.randint(4, 99, (3, 24), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.arange(24) < torch.tensor([[24], [9], [17]])
    return ids_BT.masked_fill(~mask_BT, 1), mask_BT


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_equal_those_of_transformers(tmp_path, kind):
    theirs = written(kind, tmp_path, transformers.AutoModel)
    ids_BT, mask_BT = batch()
    with torch.no_grad():
        expected_BTD = theirs(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
    encoder = load_encoder(tmp_path)
    hidden_BTD = encoder(ids_BT, mask_BT)
    assert (hidden_BTD - expected_BTD)[mask_BT].abs().max() < 1e-5
    alone_BTD = encoder(ids_BT[1:2, :9], mask_BT[1:2, :9])
    assert torch.allclose(alone_BTD[0], hidden_BTD[1, :9], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifiers_scores_equal_those_of_transformers(tmp_path, kind):
    settings = {"classifier_pooling": "mean"} if kind == "modernbert" else {}
    theirs = written(kind, tmp_path, transformers.AutoModelForSequenceClassification, num_labels=1, **settings)
    ids_BT, mask_BT = batch()
    types_BT = (torch.arange(24) >= 5).long().expand_as(ids_BT) if kind == "bert" else None
    given = {} if types_BT is None else {"token_type_ids": types_BT}
    with torch.no_grad():
        expected_BN = theirs(input_ids=ids_BT, attention_mask=mask_BT.long(), **given).logits
    encoder = load_encoder(tmp_path)
    assert encoder.config.num_labels == 1
    assert torch.allclose(encoder.scores(ids_BT, mask_BT, types_BT), expected_BN, atol=1e-5)


def test_a_folder_without_an_encoder_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ArtefactError, match=r"config\.json is missing"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"} | SMALL), encoding="utf-8")
    with pytest.raises(ArtefactError, match="'t5' are not read; known are bert"):
        read_encoder_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(ArtefactError, match="'vocab_size' is missing"):
        read_encoder_config(tmp_path)
    written("bert", tmp_path, transformers.AutoModel)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert"} | SMALL | {"num_hidden_layers": 5}), encoding="utf-8"
    )
    with pytest.raises(ArtefactError, match=r"its tensors are not those of its config\.json"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors is missing"):
        load_encoder(tmp_path)
