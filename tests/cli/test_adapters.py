"""Adapters, from the command line."""

from __future__ import annotations

import pytest

from bessemer.cli.named import named_folders
from bessemer.core.errors import ConfigError
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.storage.folder import load_model, save_model
from bessemer.serving import server
from tests.cli.test_main import bessemer, one_error
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and an adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), folder / "model", tokenizer=tokenizer)
    model = load_model(folder / "model")
    write_adapter(random_adapter(model), model, folder / "bent")
    return folder


def test_generate_says_what_the_adapter_says(place, capsys):
    arguments = ["generate", place / "model", "the thin", "--max-tokens", "20"]
    code, plain, _ = bessemer(capsys, *arguments)
    assert code == 0
    code, bent, _ = bessemer(capsys, *arguments, "--adapter", place / "bent")
    assert code == 0 and bent != plain


def test_generate_refuses_what_is_no_adapter(place, capsys):
    _, _, err = bessemer(capsys, "generate", place / "model", "the", "--adapter", place / "tokenizer")
    assert "no such adapter config" in one_error(err)


def test_serve_loads_every_adapter_under_its_name(place, capsys, monkeypatch):
    served = []
    monkeypatch.setattr(server, "serve", lambda engine, name, config, pages, **options: served.append((name, engine.adapters)))
    code, _, _ = bessemer(capsys, "serve", place / "model", "--adapter", f"a={place / 'bent'}", "--adapter", place / "bent")
    assert (code, served) == (0, [("model", ("a", "bent"))])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["=x"], "--adapter =x: give it as NAME=FOLDER"),
        (["a="], "--adapter a=: give it as NAME=FOLDER"),
        (["a=x", "a=y"], "another adapter has the name 'a' already"),
        (["base=x"], "the model has the name 'base' already"),
    ],
)
def test_a_name_that_means_two_things_or_none_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        named_folders(given, taken="base")
