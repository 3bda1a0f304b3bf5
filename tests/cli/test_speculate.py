"""Speculative decoding, from the command line."""

from __future__ import annotations

import pytest

from bessemer.model.config import ModelConfig
from bessemer.model.storage.folder import save_model
from tests.cli.test_main import bessemer, one_error
from tests.model.randomised import random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculate")
    config = ModelConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=96)
    save_model(random_decoder(config), folder / "model", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    return folder / "model"


def test_generate_prints_the_same_whatever_proposes_drafts(model, capsys):
    arguments = ["generate", model, "the thin the thin the thin", "--max-tokens", "30"]
    code, plain, _ = bessemer(capsys, *arguments)
    assert code == 0 and plain
    for method in ("ngram", model):
        assert bessemer(capsys, *arguments, "--speculate", method)[:2] == (0, plain)


def test_a_model_without_mtp_modules_is_told_so(model, capsys):
    _, _, err = bessemer(capsys, "generate", model, "the", "--speculate", "mtp")
    assert "no MTP modules" in one_error(err)
